"""The original's benchmark (benchPayChanServer.sh, RBPCP §15): clients that pay one satoshi after another.

    python bench/payments.py NUM_PAYMENTS NUM_THREADS ENDPOINT [SERVER_PUBKEY] [--node URL]

Every client is a process with one channel and one keep-alive connection: it opens with 100000 sat, pays NUM_PAYMENTS
times 1 sat, each after the answer to the one before, and closes. The server runs with debug funding, or on a regtest
node (`--node`) whose wallet then funds the channels before the clock starts.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import machine
import psutil  # type: ignore[import-untyped]  # has no stubs
import typer
from funding import Node, by_node, from_nothing
from rich.console import Console
from rich.table import Table
from session import BenchError, Funded, Paid, Server, client, stop

LEAST_CPU_SECONDS = 0.2
"""The kernel counts CPU time in hundredths of a second; a difference below this is too small to use."""


@dataclass(frozen=True)
class Run:
    """Measurements of a whole run."""

    payments: int
    wall_seconds: float
    paying_seconds: float
    latencies_ms: list[float]
    server_cpu_seconds: float | None
    client_cpu_seconds: float


def server_at(endpoint: str) -> Server:
    """Parse HOST:PORT, or a URL."""
    place = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    return Server(place.hostname or "localhost", place.port or 80)


def run(server: Server, channels: list[Funded], count: int, version: int) -> Run:
    """Start a client for each channel, let all pay together, and combine their measurements."""
    begun = time.monotonic()
    processes = server_processes(server)
    fork = multiprocessing.get_context("fork")
    go, close = fork.Event(), fork.Event()
    pipes, children = [], []
    for funded in channels:
        ours, theirs = fork.Pipe()
        child = fork.Process(target=client, args=(server, funded, count, version, go, close, theirs), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    hear_all(pipes)
    before = cpu_seconds(processes)
    go.set()
    paid: list[Paid] = hear_all(pipes)
    after = cpu_seconds(processes)
    close.set()
    hear_all(pipes)
    for child in children:
        child.join()
    wall = time.monotonic() - begun
    return Run(
        payments=count * len(channels),
        wall_seconds=wall,
        paying_seconds=(max(each.last_ns for each in paid) - min(each.first_ns for each in paid)) / 1e9,
        latencies_ms=sorted(latency / 1e6 for each in paid for latency in each.latencies),
        server_cpu_seconds=None if before is None or after is None else after - before,
        client_cpu_seconds=sum(each.cpu_seconds for each in paid),
    )


def hear_all(pipes: list[Connection]) -> list[Any]:
    """Wait for one message of each client.

    Raises:
        BenchError: a client failed or died.
    """
    heard = []
    for number, pipe in enumerate(pipes):
        try:
            message = pipe.recv()
        except EOFError:
            message = BenchError("died")
        if isinstance(message, BenchError):
            stop(f"client {number}: {message}")
        heard.append(message)
    return heard


# --- the server's CPU time ------------------------------------------------------------------------------------------


def server_processes(server: Server) -> list[psutil.Process]:
    """Return the processes that listen on the port, if it is a port of this machine."""
    try:
        local = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
        if socket.gethostbyname(server.host) not in local:
            return []
        listening = {
            entry.pid
            for entry in psutil.net_connections("tcp")
            if entry.status == psutil.CONN_LISTEN and entry.laddr and entry.laddr.port == server.port and entry.pid
        }
        return [psutil.Process(pid) for pid in listening]
    except (psutil.Error, OSError):
        return []


def cpu_seconds(processes: list[psutil.Process]) -> float | None:
    """Return the CPU seconds of the processes so far, user and system; None without processes."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times) if times else None


# --- report ---------------------------------------------------------------------------------------------------------


def figures(run: Run, rate: float) -> dict[str, Any]:
    """Compute rates and shares; `rate` is R, verifications per second on one core."""
    as_script, server_only = run.payments / run.wall_seconds, run.payments / run.paying_seconds
    used = run.server_cpu_seconds or 0.0
    cpu = round(used / run.payments * 1e6, 1) if used > LEAST_CPU_SECONDS else None
    at = run.latencies_ms
    return {
        "payments_per_second_as_script": round(as_script, 1),
        "payments_per_second_server_only": round(server_only, 1),
        "share_of_R_as_script": round(as_script / rate, 4),
        "share_of_R_server_only": round(server_only / rate, 4),
        "R_verifies_per_second": round(rate),
        "latency_ms_p50": round(at[len(at) // 2], 3),
        "latency_ms_p99": round(at[min(len(at) - 1, len(at) * 99 // 100)], 3),
        "server_cpu_us_per_payment": cpu,
        "client_cpu_us_per_payment": round(run.client_cpu_seconds / run.payments * 1e6, 1),
        "wall_seconds": round(run.wall_seconds, 3),
        "paying_seconds": round(run.paying_seconds, 3),
    }


def show(numbers: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("", "payments/s", "share of R")
    for name, key in (("as the original measured", "as_script"), ("server only", "server_only")):
        rate, share = numbers[f"payments_per_second_{key}"], numbers[f"share_of_R_{key}"]
        table.add_row(name, f"{rate:,.0f}", f"{share:.3f}")
    table.add_row("R, one core's verifications", f"{numbers['R_verifies_per_second']:,}", "1")
    for column in (1, 2):
        table.columns[column].justify = "right"
    cpu = numbers["server_cpu_us_per_payment"]
    console = Console()
    console.print(table)
    console.print(f"latency p50 {numbers['latency_ms_p50']} ms, p99 {numbers['latency_ms_p99']} ms")
    console.print(
        f"CPU per payment: server {'n/a' if cpu is None else f'{cpu} µs'}, clients {numbers['client_cpu_us_per_payment']} µs"
    )


EPILOG = """\
[bold]Examples[/bold]

  python bench/payments.py 1000 10 localhost:8000 [dim]# paychan up config/debug[/dim]

  python bench/payments.py 1000 10 localhost:8000 --node http://127.0.0.1:18443 [dim]# paychan node start; paychan up config/regtest[/dim]
"""

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog=EPILOG)
def main(
    num_payments: Annotated[int, typer.Argument(min=1, help="Payments of each client.")],
    num_threads: Annotated[int, typer.Argument(min=1, help="Clients, each a process with one channel.")],
    endpoint: Annotated[str, typer.Argument(help="HOST:PORT of a server.")],
    server_pubkey: Annotated[str | None, typer.Argument(help="Expected key of the server.")] = None,
    version: Annotated[int, typer.Option(min=1, max=2, help="Version of the protocol.")] = 1,
    node: Annotated[
        str | None, typer.Option(metavar="URL", help="The server's regtest node, whose wallet funds the channels.")
    ] = None,
    credentials: Annotated[Path, typer.Option(help="The node's .cookie, or a file user:password.")] = Path(
        ".paychan/node/regtest/.cookie"
    ),
    wallet: Annotated[str, typer.Option(help="The node's wallet that has coins.")] = "miner",
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure payments per second over real sockets, as the original's benchmark did, and for the server alone.

    Channels have debug funding, or with --node real outputs.
    """
    server = server_at(endpoint)
    facts, rate = machine.facts(), machine.verifies_per_second()
    try:
        if node is None:
            channels = from_nothing(server, server_pubkey, num_threads, version)
        else:
            channels = by_node(
                server, server_pubkey, num_threads, version, num_payments, Node(node, credentials, wallet)
            )
        done = run(server, channels, num_payments, version)
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"payments: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    funding = "debug" if node is None else "regtest node"
    print(f"Done. Executed {done.payments} payments. Funding: {funding}.")
    numbers = figures(done, rate)
    show(numbers)
    if save:
        asked = {"version": version, "funding": funding, "num_payments": num_payments, "num_threads": num_threads}
        print(f"Saved as {machine.save('payments', asked | numbers, facts)}")


if __name__ == "__main__":
    app()
