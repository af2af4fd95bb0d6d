"""Payments behind a proxy against payments without one, in turn, and whether they take the fast path.

    python bench/proxies.py [--connections N] [--payments N] [--runs N]

The proxies are those of `tests/fetch-proxies`: nginx, Caddy and haproxy with the files of config/deploy, here without TLS,
and nginx with the block for WebSockets of most tutorials, and with HTTP/1.0 to the server. They share the clients' core, so
their rates are lower bounds. The CPU time of the server for a payment is the figure that the proxy's own work does not
change. Each proxy runs between two runs without one, and is compared with their mean; of several such comparisons the median
counts.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import load
import typer
from load import Mode
from rich.console import Console
from rich.table import Table
from serve import Measured, cores, debug_server
from session import BenchError, Server

from tests.lib.proxies import COPIED, DEPLOY, PLAIN, Proxy, Recorder, free_port, payments

_PROBE = 10
"""Payments over a proxy and a recorder, which show how the proxy writes them."""


def _nginx(port: int, upstream: str) -> str:
    return re.sub(
        r"(?m)^ *(ssl_certificate|access_log|error_log|listen \[).*\n", "", _shipped("nginx.conf", upstream)
    ).replace("listen 443 ssl", f"listen 127.0.0.1:{port}")


def _caddy(port: int, upstream: str) -> str:
    return _shipped("Caddyfile", upstream).replace(
        "\npay.example {", f"\nhttp://localhost:{port}, http://127.0.0.1:{port} {{"
    )


def _haproxy(port: int, upstream: str) -> str:
    return re.sub(
        r"(?m)^ *bind :::.*\n", "", re.sub(r"bind :443.*", f"bind 127.0.0.1:{port}", _shipped("haproxy.cfg", upstream))
    )


def _shipped(name: str, upstream: str) -> str:
    return (DEPLOY / name).read_text().replace("127.0.0.1:8000", upstream)


def _block(lines: str) -> Callable[[int, str], str]:
    return lambda port, upstream: lines.format(port=port, upstream=upstream, seconds=60, scheme="")


PROXIES: dict[str, tuple[str, Callable[[int, str], str]]] = {
    "nginx as shipped": ("nginx", _nginx),
    "nginx, block of tutorials": ("nginx", _block(COPIED)),
    "nginx, HTTP/1.0": ("nginx", _block(PLAIN)),
    "Caddy as shipped": ("caddy", _caddy),
    "haproxy as shipped": ("haproxy", _haproxy),
}


def through(measured: Measured, name: str, directory: Path, upstream: str, run: Callable[[Measured], Any]) -> Any:
    """Call `run` with a server that is reached by a proxy, whose upstream is another."""
    program, lines = PROXIES[name]
    port = free_port()
    with Proxy(program, directory / f"{program}{port}", lines(port, upstream), f"http://127.0.0.1:{port}"):
        return run(replace(measured, server=Server("127.0.0.1", port)))


def takes_fast_path(measured: Measured, name: str, directory: Path) -> str:
    """Let a client pay through a proxy; return how many of its payments the fast path reads."""
    with Recorder(f"http://{measured.server.host}:{measured.server.port}") as recorder:
        through(
            measured,
            name,
            directory,
            recorder.address,
            lambda server: load.run(server, 1, _PROBE, 1, Mode.KEEP_ALIVE.value),
        )
        counts = [payments(bytes(sent)) for sent in recorder.sent]
    fast, count = (sum(each) for each in zip(*counts, strict=True))
    return "yes" if fast == count else f"{fast} of {count}"


def compare(
    measured: Measured, name: str, directory: Path, one: Callable[[Measured], dict[str, Any]], runs: int
) -> list[str]:
    """Measure one proxy between runs without it; return its row."""
    upstream = f"{measured.server.host}:{measured.server.port}"
    direct, behind = [one(measured)], []
    for _ in range(runs):
        behind.append(through(measured, name, directory, upstream, one))
        direct.append(one(measured))

    def ratio(key: str) -> float:
        between = [mean((direct[at][key], direct[at + 1][key])) for at in range(runs)]
        return median(each[key] / beside for each, beside in zip(behind, between, strict=True))

    rate = median(each["payments_per_second"] for each in behind)
    cpu = median(each["server_cpu_us_per_payment"] for each in behind)
    shares = f"{ratio('payments_per_second'):.2f}", f"{ratio('server_cpu_us_per_payment'):.2f}"
    return [name, takes_fast_path(measured, name, directory), f"{rate:,.0f}", shares[0], f"{cpu:.0f}", shares[1]]


def main(
    connections: Annotated[int, typer.Option(min=1, help="Clients, each with a channel and a connection.")] = 32,
    count: Annotated[int, typer.Option("--payments", min=10, help="Payments of each client.")] = 200,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each proxy; the median counts.")] = 3,
    version: Annotated[int, typer.Option(min=1, max=2, help="Version of the protocol.")] = 1,
) -> None:
    """Compare payments behind each proxy with payments without one."""
    os.sched_setaffinity(0, {cores()[1]})
    table = Table("proxy", "fast path", "1/s", "share", "CPU, µs", "share")
    table.columns[0].no_wrap = True

    def one(server: Measured) -> dict[str, Any]:
        return load.run(server, connections, count, version, Mode.KEEP_ALIVE.value)

    try:
        with (
            tempfile.TemporaryDirectory() as name,
            debug_server("trust_forwarded = true", log=Path(name) / "log") as measured,
        ):
            one(measured)  # warms up
            for proxy in PROXIES:
                table.add_row(*compare(measured, proxy, Path(name), one, runs))
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"proxies: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    Console().print(table)
    print("payments a second, and the server's CPU time for a payment; each with its share of that without a proxy")


if __name__ == "__main__":
    typer.run(main)
