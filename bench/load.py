"""Measure the payments per second of one server process on one core: verified, and synced before each answer.

    python bench/load.py [--version 1|2] [--connections N] [--mode keep-alive|connection-each]

The benchmark starts its own server in debug mode on one core. All clients are one process on another core, with
requests that were signed before. Rates are given as shares of R, the signature verifications per second on the server's
core (coincurve). R is the mean of slices before, after and between the ten parts of a run, since a shared machine's
speed changes within seconds. Every run has new channels. The run with the median share counts; bench/results keeps all.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from array import array
from collections.abc import Callable
from enum import Enum
from statistics import mean
from typing import Annotated, Any, cast

import machine
import rest
import typer
from funding import from_nothing
from rich.console import Console
from rich.table import Table
from serve import Measured, cores, debug_server, sync_ms
from session import BenchError

SHOWN = {
    "payments_per_second": "payments/s",
    "share_of_R": "share of R",
    "server_cpu_us_per_payment": "server CPU, µs",
    "server_cpu_verifies_per_payment": "in verifies",
    "server_cores_used": "cores used",
    "latency_ms_p50": "p50, ms",
    "latency_ms_p99": "p99, ms",
}


class Mode(Enum):
    """Use of connections by the clients."""

    KEEP_ALIVE = "keep-alive"
    CONNECTION_EACH = "connection-each"


def run(measured: Measured, connections: int, count: int, version: int, mode: str) -> dict[str, Any]:
    """Let `connections` clients pay together, `count` times each."""
    return generate(measured, connections, version, rest.generator, count, version, mode)


def generate(
    measured: Measured, clients: int, version: int, generator: Callable[..., None], *arguments: Any
) -> dict[str, Any]:
    """Open channels for clients, run a generator on another core, and return the figures.

    The generator gets server, channels, `arguments`, its core and a pipe. It pays in parts, one for each "go".
    """
    channels = from_nothing(measured.server, None, clients, version)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    passed = (measured.server, channels, *arguments, cores()[1], theirs)
    child = fork.Process(target=generator, args=passed, daemon=True)
    child.start()
    theirs.close()
    rest.hear(ours)
    latencies, seconds, cpu, units = array("q"), 0.0, 0.0, [unit()]
    for _ in range(rest.PARTS):
        cpu_before, begun = measured.cpu_seconds(), time.monotonic()
        ours.send("go")
        latencies.extend(cast("array[int]", rest.hear(ours)))
        seconds += time.monotonic() - begun
        cpu += measured.cpu_seconds() - cpu_before
        units.append(unit())
    child.join()
    rate, verify_us = (mean(each) for each in zip(*units, strict=True))
    told_sync = {"sync_ms_median": round(sync_ms(measured.directory), 3)}
    return figures(rate, verify_us, sorted(latencies), seconds, cpu) | told_sync


def unit() -> tuple[float, float]:
    """Measure R and the CPU time of a verification on the server's core while the server is idle."""
    ours, others = cores()
    os.sched_setaffinity(0, {ours})
    try:
        return machine.mean_verifies()
    finally:
        os.sched_setaffinity(0, {others})


def figures(rate: float, verify_us: float, latencies: list[int], seconds: float, cpu: float) -> dict[str, Any]:
    payments = len(latencies)
    cpu_us = cpu / payments * 1e6
    return {
        "payments_per_second": round(payments / seconds),
        "share_of_R": round(payments / seconds / rate, 4),
        "R_verifies_per_second": round(rate),
        "verify_cpu_us": round(verify_us, 1),
        "server_cpu_us_per_payment": round(cpu_us, 1),
        "server_cpu_verifies_per_payment": round(cpu_us / verify_us, 2),
        "server_cores_used": round(cpu / seconds, 3),
        "latency_ms_p50": round(latencies[payments // 2] / 1e6, 3),
        "latency_ms_p99": round(latencies[payments * 99 // 100] / 1e6, 3),
        "load_average": round(os.getloadavg()[0], 2),
    }


def show(runs: list[dict[str, Any]]) -> None:
    """Print all runs in the order of their share of R; the middle one is the result."""
    table = Table(*SHOWN.values())
    for number, each in enumerate(runs):
        table.add_row(*(str(each[key]) for key in SHOWN), style="bold" if number == len(runs) // 2 else None)
    Console().print(table)
    middle = runs[len(runs) // 2]
    print(f"R {middle['R_verifies_per_second']:,}/s, a sync {middle['sync_ms_median']} ms (medians of the bold run)")


def main(
    version: Annotated[int, typer.Option(min=1, max=2, help="Version of the protocol.")] = 1,
    connections: Annotated[int, typer.Option(min=1, help="Clients, each with a channel and a connection.")] = 32,
    payments: Annotated[int, typer.Option(min=1, help="Payments of each client.")] = 1000,
    mode: Annotated[Mode, typer.Option(help="A connection for all payments, or one for each.")] = Mode.KEEP_ALIVE,
    runs: Annotated[int, typer.Option(min=1, help="Runs; the median counts.")] = 5,
    http: Annotated[str, typer.Option(help="TOML for the server's table http.")] = "",
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure payments per second, CPU time of the server and latencies."""
    facts = machine.facts()
    os.sched_setaffinity(0, {cores()[1]})
    try:
        with debug_server(http) as measured:
            run(measured, connections, max(1, payments // 10), version, mode.value)  # warms up
            done = [run(measured, connections, payments, version, mode.value) for _ in range(runs)]
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"load: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    done.sort(key=lambda each: each["share_of_R"])
    show(done)
    if save:
        asked = {"version": version, "connections": connections, "payments_each": payments, "mode": mode.value}
        asked |= {"http": http, "durability": "fdatasync before every answer, one for each group"}
        numbers = asked | {"median": done[len(done) // 2], "runs": done}
        print(f"Saved as {machine.save(f'load-v{version}-{mode.value}-{connections}', numbers, facts)}")


if __name__ == "__main__":
    typer.run(main)
