"""Measure the payments per second of one server process on one core over payment streams.

    python bench/stream.py [--each 16] [--in-flight 1] [--no-coalesce]

Payments are verified, and synced to disk before each answer, as in `bench/load.py` for `PUT`; see there for R. A frame
has `--each` payments; `--in-flight` frames of a stream wait for an answer. Without coalescing every signature is
checked.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import frames
import load
import machine
import typer
from rich.console import Console
from serve import Measured, cores, debug_server
from session import BenchError


def run(measured: Measured, streams: int, count: int, each: int, in_flight: int) -> dict[str, Any]:
    """Let `streams` streams pay together, `count` times each."""
    return load.generate(measured, streams, 2, frames.generator, count, each, in_flight)


def main(
    each: Annotated[int, typer.Option(min=1, help="Payments in a frame.")] = 16,
    in_flight: Annotated[int, typer.Option(min=1, help="Frames of a stream without an answer.")] = 1,
    coalesce: Annotated[bool, typer.Option(help="Verify the newest of several payments first.")] = True,
    streams: Annotated[int, typer.Option(min=1, help="Clients, each with a channel and a stream.")] = 32,
    payments: Annotated[int, typer.Option(min=1, help="Payments of each client, rounded down to whole frames.")] = 3200,
    runs: Annotated[int, typer.Option(min=1, help="Runs; the median counts.")] = 5,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure payments per second, CPU time of the server and latencies."""
    facts, count = machine.facts(), max(1, payments // each) * each
    os.sched_setaffinity(0, {cores()[1]})
    try:
        with debug_server(f"[stream]\ncoalesce = {str(coalesce).lower()}") as measured:
            run(measured, streams, each * 20, each, in_flight)  # warms up
            done = [run(measured, streams, count, each, in_flight) for _ in range(runs)]
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"stream: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    done.sort(key=lambda run: run["share_of_R"])
    load.show(done)
    if save:
        asked = {"streams": streams, "payments_each": count, "payments_in_a_frame": each, "frames_in_flight": in_flight}
        asked |= {"coalesce": coalesce, "durability": "fdatasync before every answer, one for each group"}
        name = f"stream-{each}x{in_flight}-{'coalesced' if coalesce else 'each'}-{streams}"
        print(f"Saved as {machine.save(name, asked | {'median': done[len(done) // 2], 'runs': done}, facts)}")


if __name__ == "__main__":
    typer.run(main)
