"""CPU time of the server for a payment, against the least that a Python process can do.

    python bench/floor.py [--version 1|2] [--pairs N] [--connections N]

Runs `floor_server.py` and the server in turn on one core, with the same clients on another. The ratio of their CPU times
for one payment is the figure that a shared machine changes least; each pair has its own, and the median counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import load
import machine
import psutil  # type: ignore[import-untyped]  # has no stubs
import typer
from load import Mode
from rich.console import Console
from rich.table import Table
from serve import Measured, cores, debug_server
from session import BenchError, Server

_CPU = "server_cpu_us_per_payment"


@contextmanager
def floor_server() -> Iterator[Measured]:
    """Run the floor alone on the server's core."""
    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk; /tmp may be memory
        directory = Path(name).resolve()
        command = [sys.executable, str(Path(__file__).with_name("floor_server.py")), str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            os.sched_setaffinity(process.pid, {cores()[0]})
            assert process.stdout is not None
            server = Server("127.0.0.1", int(process.stdout.readline()))
            try:
                yield Measured(server, psutil.Process(process.pid), directory, server)
            finally:
                process.terminate()


def pair(version: int, connections: int, payments: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the floor, then the server, each warmed up."""
    done = []
    for start in (floor_server, debug_server):
        with start() as measured:
            load.run(measured, connections, max(1, payments // 10), version, Mode.KEEP_ALIVE.value)
            done.append(load.run(measured, connections, payments, version, Mode.KEEP_ALIVE.value))
    return done[0], done[1]


def show(version: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Print each pair, and return the median ratio of CPU times."""
    table = Table(f"v{version}", "payments/s", "CPU, µs", "in verifies", "ratio of CPU")
    ratios = [server[_CPU] / floor[_CPU] for floor, server in pairs]
    for (floor, server), ratio in zip(pairs, ratios, strict=True):
        for name, each in (("floor", floor), ("server", server)):
            rate = f"{each['payments_per_second']:,}"
            share = str(each["server_cpu_verifies_per_payment"])
            table.add_row(name, rate, str(each[_CPU]), share, f"{ratio:.2f}" if each is server else "")
    Console().print(table)
    print(f"server over floor: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    return median(ratios)


def main(
    version: Annotated[list[int] | None, typer.Option(min=1, max=2, help="Versions of the protocol; both.")] = None,
    connections: Annotated[int, typer.Option(min=1, help="Clients, each with a channel and a connection.")] = 32,
    payments: Annotated[int, typer.Option(min=1, help="Payments of each client.")] = 1000,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs; the median counts.")] = 5,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure CPU time per payment of the floor and of the server, in turn."""
    facts, result = machine.facts(), dict[str, Any]()
    os.sched_setaffinity(0, {cores()[1]})
    try:
        for each in version or [1, 2]:
            done = [pair(each, connections, payments) for _ in range(pairs)]
            result[f"v{each}"] = {"median_ratio": round(show(each, done), 3), "pairs": done}
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"floor: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if save:
        asked = {"connections": connections, "payments_each": payments}
        print(f"Saved as {machine.save('floor', asked | result, facts)}")


if __name__ == "__main__":
    typer.run(main)
