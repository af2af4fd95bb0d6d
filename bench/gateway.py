"""Paid requests through the gateway beside unpaid ones, bare offers and the stock x402 middleware, in one run and in turn.

    python bench/gateway.py [--connections N] [--requests N] [--rounds N] [--way x402|mpp] [--no-stock] [--json]

One core has the gateway's server and, when its turn comes, the stock middleware; all else is on another core: the small
upstream, and one process of clients with raw sockets, whose payments were signed before the clock starts. In each round each
side answers a short load, and R, the bare signature verifications per second on the server's core, is measured
before and after. So a ratio compares what happened within a second or two, and the median over all rounds counts.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Annotated, Any

import machine
import psutil  # type: ignore[import-untyped]  # has no stubs
import rest
import typer
from funding import from_nothing
from load import unit
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from serve import Measured, cores, debug_server
from session import OPENING_SAT, BenchError, Funded, Server, exchange, session_v2, stop

from paychan.protocol.payment import sign_payment
from paychan.protocol.types import Sat
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.offers import Voucher
from paychan.protocol.wire.x402_json import REQUIRED_HEADER, SIGNATURE_HEADER, read_required
from paychan.running import read_running

PRICE_SAT = 25
PAID, FREE = "/v1/item", "/free/item"
STOCK_PACKAGES = ("x402[fastapi,evm]>=2.25,<3", "uvicorn[standard]", "coincurve")
"""Of the environment of the stock middleware. It has two sides: as its packages install it, and with coincurve."""

_PRICES = """
upstream = "http://127.0.0.1:{port}"
free = ["/free/**"]
[[route]]
path = "/v1/**"
price_sat = {price}
"""

_PATIENT_SECONDS = 3600
"""Connections wait for their side's turn."""

_STOCK_SHARE = 5
"""A stock payment costs several times the CPU time of a gateway payment, so its side gets this part of the requests."""

RATIOS = {
    "paid / unpaid, CPU": ("paid", "free", "cpu_us"),
    "paid / unpaid, requests/s": ("paid", "free", "rate"),
    "paid / stock, requests/s": ("paid", "stock", "rate"),
    "stock / paid, CPU": ("stock", "paid", "cpu_us"),
    "paid / stock with coincurve, requests/s": ("paid", "stock, coincurve", "rate"),
    "stock with coincurve / paid, CPU": ("stock, coincurve", "paid", "cpu_us"),
    "stock, unpaid / paid, CPU": ("stock, unpaid", "paid", "cpu_us"),
}


class Side(Struct):
    """A load in short parts: the process whose CPU time counts, and each client's requests in order."""

    name: str
    measured: Measured
    requests: list[list[bytes]]
    answers: bytes = b"HTTP/1.1 2"
    """First bytes of each answer."""


class Row(Struct):
    """Figures of one side in one round."""

    side: str
    rate: float
    cpu_us: float
    """Of the server's process, for each request."""
    p50_ms: float
    verifies_per_second: float
    """R around this part of the round."""
    verify_us: float


# --- servers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _program(core: int, directory: Path, python: str | Path, *arguments: str, keys: str = "") -> Iterator[Measured]:
    """Run a program that prints its port; `keys` names the library that eth-keys uses."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"ECC_BACKEND_CLASS": f"eth_keys.backends.{keys}"} if keys else {}
    with subprocess.Popen([str(python), *arguments], stdout=subprocess.PIPE, text=True, env=environment) as process:
        os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        try:
            if not port:
                stop(f"{arguments[0]} did not start")
            server = Server("127.0.0.1", int(port))
            yield Measured(server, psutil.Process(process.pid), directory, server)
        finally:
            process.terminate()


@contextmanager
def gateway(directory: Path, upstream: Server) -> Iterator[tuple[Measured, Measured]]:
    """Run a server with a gateway; yield it twice, by the addresses of its API and of its gateway."""
    prices = directory / "prices.toml"
    prices.write_text(_PRICES.format(port=upstream.port, price=PRICE_SAT))
    patient = f"head_seconds = {_PATIENT_SECONDS}\nidle_seconds = {_PATIENT_SECONDS}\n"
    with debug_server(patient + f'[gateway]\nport = 0\nprices = "{prices}"', log=directory / "log") as api:
        running = read_running(api.directory / "state")
        if running is None or not running.gateway_url:
            stop("the server has no gateway")
        host, _, port = running.gateway_url.removeprefix("http://").partition(":")
        yield api, Measured(Server(host, int(port)), api.process, api.directory, api.management)


def stock_python() -> Path:
    """Return the Python of the stock middleware's environment; uv makes it once."""
    place = Path.home() / ".cache" / "paychan-bench" / "stock-x402"
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "-q", "--clear", place, "--python", sys.executable], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *STOCK_PACKAGES], check=True)
        (place / "complete").touch()
    return python


# --- requests ---------------------------------------------------------------------------------------------------------


def get(path: str, server: Server, *lines: str) -> bytes:
    """Build a GET."""
    fields = "".join(f"{line}\r\n" for line in ("Accept: */*", "User-Agent: bench", *lines))
    return f"GET {path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n{fields}\r\n".encode()


def offered(server: Server) -> tuple[x402.Found, Any]:
    """Read the gateway's offer in both ways."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("GET", PAID)
    answer = connection.getresponse()
    headers = answer.headers
    answer.read()
    connection.close()
    if answer.status != 402:
        stop(f"GET {PAID}: got {answer.status}, want 402")
    found = x402.offers(read_required(headers[REQUIRED_HEADER]))[0]
    return found, mpp.offers(headers.get_all("WWW-Authenticate") or [])[0].challenge


def paid_requests(api: Server, server: Server, funded: Funded, count: int, way: str) -> list[bytes]:
    """Open a channel, and sign payments that each give the price of one request more."""
    terms, outpoint, value = funded.terms, funded.outpoint, funded.value_sat
    sums = [OPENING_SAT + PRICE_SAT * number for number in range(count + 1)]
    payments = [
        sign_payment(funded.key, terms, outpoint, value, terms.funding_script, Sat(value - paid)) for paid in sums
    ]
    with socket.create_connection((api.host, api.port)) as connection:
        exchange(connection, session_v2(api, payments[:2], terms, outpoint).opening)
    found, challenge = offered(server)

    def line(voucher: Voucher) -> str:
        if way == "mpp":
            return f"Authorization: {mpp.credential_header(challenge, voucher)}"
        return f"{SIGNATURE_HEADER}: {x402.payment_header(found, voucher)}"

    return [get(PAID, server, line(Voucher.of(outpoint, value, payment))) for payment in payments[1:]]


def buyers(sides: list[Side], parts: int, core: int, pipe: Pipe) -> None:
    """Let the clients of a side send one part of their requests at each command; the body of a process."""
    os.sched_setaffinity(0, {core})
    try:
        clients = {
            side.name: [rest.Client(side.measured.server, "keep-alive", side.answers) for _ in side.requests]
            for side in sides
        }
        by_name = {side.name: side for side in sides}
        pipe.send("ready")
        while (command := pipe.recv()) is not None:
            name, part = command
            shares = [
                each[part * len(each) // parts : (part + 1) * len(each) // parts] for each in by_name[name].requests
            ]
            pipe.send(rest.pay(clients[name], shares))
    except (BenchError, OSError) as error:
        pipe.send(BenchError(str(error)))


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(sides: list[Side], parts: int) -> list[list[Row]]:
    """Let each side work in each round; the order turns round from one to the next, and the first round warms up."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=buyers, args=(sides, parts, cores()[1], theirs), daemon=True)
    child.start()
    theirs.close()
    rest.hear(ours)
    rounds = []
    for part in range(parts):
        rows, before = [], unit()
        for side in sides if part % 2 else reversed(sides):
            cpu, begun = side.measured.cpu_seconds(), time.monotonic()
            ours.send((side.name, part))
            latencies = sorted(rest.hear(ours))  # type: ignore[call-overload]  # an array of ns
            seconds, used, after = time.monotonic() - begun, side.measured.cpu_seconds() - cpu, unit()
            rate, verify_us = (mean(each) for each in zip(before, after, strict=True))
            count, before = len(latencies), after
            rows.append(
                Row(side.name, count / seconds, used / count * 1e6, latencies[count // 2] / 1e6, rate, verify_us)
            )
        rounds.append(rows)
    ours.send(None)
    child.join()
    return rounds[1:]


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, the middle half and the number of values."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(median(values), 4), "from": round(low, 4), "to": round(high, 4), "rounds": len(values)}


def figures(rounds: list[list[Row]]) -> dict[str, Any]:
    """Return medians of each side, and the ratios of rows of the same round."""
    by_name = [{row.side: row for row in rows} for rows in rounds]
    sides = {
        name: {
            "requests_per_second": spread([rows[name].rate for rows in by_name]),
            "share_of_R": spread([rows[name].rate / rows[name].verifies_per_second for rows in by_name]),
            "cpu_us": spread([rows[name].cpu_us for rows in by_name]),
            "cpu_verifies": spread([rows[name].cpu_us / rows[name].verify_us for rows in by_name]),
            "share_of_R_by_cpu": spread([rows[name].verify_us / rows[name].cpu_us for rows in by_name]),
            "p50_ms": spread([rows[name].p50_ms for rows in by_name]),
        }
        for name in by_name[0]
    }
    ratios = {
        shown: spread([getattr(rows[one], key) / getattr(rows[other], key) for rows in by_name])
        for shown, (one, other, key) in RATIOS.items()
        if one in sides and other in sides
    }
    return {"sides": sides, "ratios": ratios}


def show(numbers: dict[str, Any]) -> None:
    """Print sides and ratios: medians, and the middle half of the rounds."""
    console = Console(width=140)
    table = Table("requests", "1/s", "share of R", "server CPU, µs", "in verifies", "R / CPU in verifies", "p50, ms")
    for name, side in numbers["sides"].items():
        rate, cpu = side["requests_per_second"]["median"], side["cpu_us"]["median"]
        others = [side[key] for key in ("cpu_verifies", "share_of_R_by_cpu", "p50_ms")]
        table.add_row(name, f"{rate:,.0f}", _range(side["share_of_R"]), f"{cpu:.0f}", *map(_range, others))
    console.print(table)
    table = Table("ratio in the same round", "median (middle half of the rounds)")
    for name, ratio in numbers["ratios"].items():
        table.add_row(name, _range(ratio))
    console.print(table)


def _range(values: dict[str, Any]) -> str:
    return f"{values['median']:.3g} ({values['from']:.3g} to {values['to']:.3g})"


def prepared(stack: ExitStack, directory: Path, connections: int, count: int, way: str, *, stock: bool) -> list[Side]:
    """Start all servers, open all channels, sign all payments."""
    ours, others = cores()
    small = stack.enter_context(_program(others, directory, sys.executable, _beside("small_server.py")))
    api, gate = stack.enter_context(gateway(directory, small.server))
    channels = from_nothing(api.server, None, connections, 2)
    paid = [paid_requests(api.server, gate.server, each, count, way) for each in channels]
    plain = [[get(PAID, gate.server)] * count] * connections
    sides = [
        Side("paid", gate, paid),
        Side("free", gate, [[get(FREE, gate.server)] * count] * connections),
        Side("offer", gate, plain, b"HTTP/1.1 402"),
        Side("upstream alone", small, [[get(FREE, small.server)] * count] * connections),
    ]
    if stock:
        few = count // _STOCK_SHARE
        for name, keys in (("stock", "NativeECCBackend"), ("stock, coincurve", "CoinCurveECCBackend")):
            file = directory / keys
            arguments = (_beside("stock_x402.py"), str(file), str(connections), str(few))
            theirs = stack.enter_context(_program(ours, directory, stock_python(), *arguments, keys=keys))
            lines = [line.split() for line in file.read_text().splitlines()]
            signed = [[get(PAID, theirs.server, f"{SIGNATURE_HEADER}: {each}") for each in line] for line in lines]
            sides.append(Side(name, theirs, signed))
        sides.append(Side("stock, unpaid", theirs, [[get(FREE, theirs.server)] * few] * connections))
    return sides


def _beside(name: str) -> str:
    return str(Path(__file__).with_name(name))


def main(
    connections: Annotated[int, typer.Option(min=1, help="Clients, each with a channel and a connection.")] = 16,
    requests: Annotated[int, typer.Option(min=10, help="Requests of each client in a round.")] = 25,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the median counts.")] = 20,
    way: Annotated[str, typer.Option(help="x402 or mpp.")] = "x402",
    stock: Annotated[bool, typer.Option(help="Also measure the stock x402 middleware.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures for programs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure requests through the gateway."""
    facts, parts = machine.facts(), rounds + 1
    os.sched_setaffinity(0, {cores()[1]})
    try:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="."))).resolve()
            sides = prepared(stack, directory, connections, requests * parts, way, stock=stock)
            numbers = figures(measure(sides, parts))
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"gateway: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        show(numbers)
    if save:
        asked = {"connections": connections, "requests_each": requests, "rounds": rounds, "way": way}
        print(f"Saved as {machine.save('gateway', asked | numbers, facts)}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
