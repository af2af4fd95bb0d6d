"""What many channels cost: starting on a store of them, memory of those that are idle and awake, waking, and paying.

    python bench/channels.py [NUMBER] [--active N …]

A store is filled with NUMBER open channels. For each --active, in a process of its own and without HTTP, the real
actors, group commit and LevelDB wake so many more channels and pay over them, 32 at a time, payments really signed and
verified. Then a real server (debug mode) starts on that store, after one that started on an empty store.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any
from urllib.request import Request, urlopen

import machine
import typer
import uvloop
from crowd import TRACED, WARM, awake, fill, private_bytes
from rich.console import Console
from rich.table import Table
from serve import debug_server, sync_ms
from session import BenchError, stop

from paychan.running import read_running

SHOWN = {
    "bytes_per_awake_channel": "memory of one, bytes",
    "python_bytes_per_awake_channel": "of Python's objects",
    "read_us_p50": "reading an idle one, µs",
    "wake_us_p50": "waking one, µs",
    "wake_us_p99": "waking, p99",
    "payments_per_second": "payments/s",
    "share_of_R": "share of R",
    "payment_ms_p50": "payment p50, ms",
    "payment_ms_p99": "payment p99, ms",
}

_ROUND_SECONDS = 1_800.0


def apart(work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
    """Do something in a process that nothing before has made large."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run, (work, arguments))


def _run(work: Callable[..., Coroutine[Any, Any, Any]], arguments: tuple[Any, ...]) -> Any:
    return uvloop.run(work(*arguments))


def start(store: Path | None) -> dict[str, Any]:
    """Start a server and its signer; tell when it listens, and what it takes when it has been through all channels."""
    begun = time.perf_counter()
    with debug_server(store=store) as measured:
        seconds, cpu = time.perf_counter() - begun, measured.cpu_seconds()
        wait_until_seen(measured.directory / "state")
        told = {
            "listening_after_seconds": round(seconds, 2),
            "server_cpu_seconds_to_listening": round(cpu, 2),
            "all_seen_after_seconds": round(time.perf_counter() - begun, 1),
            "server_cpu_seconds_to_all_seen": round(measured.cpu_seconds(), 2),
            "private_bytes": private_bytes(measured.process.pid),
            "resident_bytes": measured.process.memory_info().rss,
        }
        if store is not None:
            told |= {f"totals_{name}_seconds": ask_totals(measured.directory / "state") for name in ("first", "again")}
    return told


def wait_until_seen(state: Path) -> None:
    """Wait until the first round over all channels is over."""
    deadline = time.monotonic() + _ROUND_SECONDS
    while time.monotonic() < deadline:
        if ask(state, "/health")["all_channels_seen"]:
            return
        time.sleep(0.2)
    stop("the server does not come to the end of its channels")


def ask(state: Path, path: str) -> dict[str, Any]:
    """Ask the management interface."""
    running, token = read_running(state), (state / "management.token").read_text()
    assert running is not None
    asked = Request(running.management_url + path, headers={"Authorization": f"Bearer {token}"})
    with urlopen(asked, timeout=_ROUND_SECONDS) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def ask_totals(state: Path) -> float:
    """Ask for the totals; return the seconds until they came."""
    begun = time.perf_counter()
    ask(state, "/totals")
    return round(time.perf_counter() - begun, 3)


def measure(number: int, actives: list[int], directory: Path) -> dict[str, Any]:
    """Fill, wake, start."""
    store = directory / "store"
    filled = apart(fill, store, number)
    size = sum(file.stat().st_size for file in store.iterdir())
    runs, first = [], 0
    for active in actives:
        before = machine.verifies_per_second()
        told = apart(awake, store, first, active, number)
        first += active + WARM + TRACED
        rate = (before + machine.verifies_per_second()) / 2
        runs.append(
            told
            | {
                "R_verifies_per_second": round(rate),
                "share_of_R": round(told["payments_per_second"] / rate, 4),
                "load_average": round(os.getloadavg()[0], 2),
            }
        )
    empty, full = start(None), start(store)
    return {
        "channels": number,
        "filled_per_second": round(number / filled),
        "store_bytes_per_channel": round(size / number),
        "private_bytes_per_idle_channel": round((full["private_bytes"] - empty["private_bytes"]) / number, 1),
        "start": {"empty": empty, "full": full},
        "awake": runs,
    }


def show(told: dict[str, Any]) -> None:
    table = Table("channels awake", *(f"{each['channels_awake']:,}" for each in told["awake"]))
    for key, name in SHOWN.items():
        table.add_row(name, *(f"{each[key]:,}" for each in told["awake"]))
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
    for name, each in told["start"].items():
        print(
            f"{name} store: listening after {each['listening_after_seconds']} s "
            f"({each['server_cpu_seconds_to_listening']} s of CPU), all seen after {each['all_seen_after_seconds']} s "
            f"({each['server_cpu_seconds_to_all_seen']} s of CPU), {each['private_bytes'] / 1e6:.1f} MB"
        )
    full = told["start"]["full"]
    print(f"an idle channel: {told['private_bytes_per_idle_channel']} bytes beyond the store")
    print(f"totals: {full['totals_first_seconds']} s, asked again {full['totals_again_seconds']} s")


def main(
    number: Annotated[int, typer.Argument(min=1, help="Open channels in the store.")] = 100_000,
    active: Annotated[list[int] | None, typer.Option(min=1, help="Channels awake.", show_default="1000 10000")] = None,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure start, memory and latency against the number of channels.

    Example: python bench/channels.py 1000000 --active 10000
    """
    facts = machine.facts()
    try:
        with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk; /tmp may be memory
            told = measure(number, active or [1_000, 10_000], Path(name).resolve())
            told["sync_ms_median"] = round(sync_ms(Path(name)), 3)
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"channels: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    show(told)
    if save:
        told["durability"] = "fdatasync before every answer, one for each group"
        print(f"Saved as {machine.save(f'channels-{number}', told, facts)}")


if __name__ == "__main__":
    typer.run(main)
