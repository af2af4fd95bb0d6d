"""Measure what a real node costs: run the load of payments.py in turn on a debug server and on a server with a node.

    python bench/compare.py DEBUG_ENDPOINT NODE_ENDPOINT --node URL

Both servers run on the same machine; one waits while the other is measured. Runs come in pairs of alternating order, so
that other work on the machine affects both servers equally. One pair before that warms up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import machine
import typer
from funding import Node, by_node, from_nothing
from payments import figures, run, server_at
from rich.console import Console
from rich.table import Table
from session import BenchError, Funded, Server

KEYS = {
    "payments_per_second_server_only": "payments/s",
    "payments_per_second_as_script": "with opening and closing",
    "server_cpu_us_per_payment": "server CPU, µs",
    "latency_ms_p50": "p50, ms",
    "latency_ms_p99": "p99, ms",
}


def pair(sides: dict[str, Callable[[], dict[str, Any]]], number: int) -> dict[str, dict[str, Any]]:
    """Measure each side once; the order alternates from pair to pair."""
    names = sorted(sides, reverse=bool(number % 2))
    return {name: sides[name]() for name in names}


def ratios(pairs: list[dict[str, dict[str, Any]]], key: str) -> dict[str, Any] | None:
    """Return medians and extremes of both sides, and the ratio node to debug; None if a run was too short."""
    debug, node = ([each[side][key] for each in pairs] for side in ("debug", "node"))
    if None in debug + node:
        return None
    of_pairs = sorted(b / a for a, b in zip(debug, node, strict=True))
    numbers = {
        name: {"median": median(values), "least": min(values), "most": max(values)}
        for name, values in (("debug", debug), ("node", node))
    }
    return numbers | {
        "ratio_of_medians": round(median(node) / median(debug), 4),
        "median_of_ratios": round(median(of_pairs), 4),
        "ratios": [round(each, 4) for each in of_pairs],
    }


def show(numbers: dict[str, Any]) -> None:
    """Print medians, extremes and ratios as a table."""
    table = Table("median (minimum to maximum)", "debug", "node", "ratio", "by pairs")
    for key, name in KEYS.items():
        if (of := numbers[key]) is not None:
            sides = [
                f"{side['median']:,.4g} ({side['least']:,.4g} to {side['most']:,.4g})"
                for side in (of["debug"], of["node"])
            ]
            table.add_row(name, *sides, f"{of['ratio_of_medians']:.3f}", f"{of['median_of_ratios']:.3f}")
    Console().print(table)


def main(
    debug_endpoint: Annotated[str, typer.Argument(help="HOST:PORT of a server in debug mode.")],
    node_endpoint: Annotated[str, typer.Argument(help="HOST:PORT of a server on the regtest node.")],
    node: Annotated[str, typer.Option(metavar="URL", help="The regtest node, whose wallet funds the channels.")],
    credentials: Annotated[Path, typer.Option(help="The node's .cookie, or a file user:password.")] = Path(
        ".paychan/node/regtest/.cookie"
    ),
    wallet: Annotated[str, typer.Option(help="The node's wallet that has coins.")] = "miner",
    pairs: Annotated[int, typer.Option(min=1, help="Runs on each server.")] = 5,
    payments: Annotated[int, typer.Option(min=1, help="Payments of each client.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Clients, each a process with one channel.")] = 10,
    version: Annotated[int, typer.Option(min=1, max=2, help="Version of the protocol.")] = 1,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure payments per second on both servers in turn, and compare them."""
    believed, real, coins = server_at(debug_endpoint), server_at(node_endpoint), Node(node, credentials, wallet)

    def measure(server: Server, channels: list[Funded]) -> dict[str, Any]:
        numbers = figures(run(server, channels, payments, version), rate)
        return numbers | {"load_average": round(os.getloadavg()[0], 2)}

    facts, rate = machine.facts(), machine.verifies_per_second()
    sides = {
        "debug": lambda: measure(believed, from_nothing(believed, None, clients, version)),
        "node": lambda: measure(real, by_node(real, None, clients, version, payments, coins)),
    }
    done = []
    try:
        for number in range(-1, pairs):
            done.append(pair(sides, number))
            rates = [done[-1][side]["payments_per_second_server_only"] for side in ("debug", "node")]
            print(
                f"{'warm' if number < 0 else number + 1}: debug {rates[0]:,.0f}/s, node {rates[1]:,.0f}/s", flush=True
            )
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"compare: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    numbers = {key: ratios(done[1:], key) for key in KEYS}
    show(numbers)
    if save:
        asked = {"version": version, "num_payments": payments, "num_threads": clients}
        print(f"Saved as {machine.save('compare', asked | numbers | {'pairs': done[1:]}, facts)}")


if __name__ == "__main__":
    typer.run(main)
