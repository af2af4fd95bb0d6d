"""Measure the cost of many channels: server start, memory of idle and awake channels, waking, and paying.

    python bench/channels.py [NUMBER] [--active N …]

The benchmark fills a store with NUMBER open channels. For each --active N, a new process without HTTP runs the real
actors, group commit and LevelDB. It wakes N more channels and pays over them, 32 at a time; the payments are really
signed and verified. Then a real server (debug mode) starts on that store, after one that started on an empty store.
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
    "bytes_per_awake_channel": "memory of an awake channel, bytes",
    "python_bytes_per_awake_channel": "of it, Python objects",
    "read_us_p50": "reading an idle channel, µs",
    "wake_us_p50": "waking a channel, µs",
    "wake_us_p99": "waking, p99",
    "payments_per_second": "payments/s",
    "share_of_R": "share of R",
    "payment_ms_p50": "payment p50, ms",
    "payment_ms_p99": "payment p99, ms",
}

_ROUND_SECONDS = 1_800.0


def apart(work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
    """Run `work` in a new process, so that earlier work does not count towards its memory."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run, (work, arguments))


def _run(work: Callable[..., Coroutine[Any, Any, Any]], arguments: tuple[Any, ...]) -> Any:
    return uvloop.run(work(*arguments))


def start(store: Path | None) -> dict[str, Any]:
    """Start a server and its signer; return times and resources, until the first scan over all channels is done."""
    begun = time.perf_counter()
    with debug_server(store=store) as measured:
        seconds, cpu = time.perf_counter() - begun, measured.cpu_seconds()
        wait_until_seen(measured.directory / "state")
        numbers = {
            "listening_after_seconds": round(seconds, 2),
            "server_cpu_seconds_to_listening": round(cpu, 2),
            "all_seen_after_seconds": round(time.perf_counter() - begun, 1),
            "server_cpu_seconds_to_all_seen": round(measured.cpu_seconds(), 2),
            "private_bytes": private_bytes(measured.process.pid),
            "resident_bytes": measured.process.memory_info().rss,
        }
        if store is not None:
            numbers |= {
                f"totals_{name}_seconds": ask_totals(measured.directory / "state") for name in ("first", "again")
            }
    return numbers


def wait_until_seen(state: Path) -> None:
    """Wait until the server has finished its first scan over all channels."""
    deadline = time.monotonic() + _ROUND_SECONDS
    while time.monotonic() < deadline:
        if ask(state, "/health")["all_channels_seen"]:
            return
        time.sleep(0.2)
    stop("the server does not finish its scan over all channels")


def ask(state: Path, path: str) -> dict[str, Any]:
    """Send a request to the management interface."""
    running, token = read_running(state), (state / "management.token").read_text()
    assert running is not None
    asked = Request(running.management_url + path, headers={"Authorization": f"Bearer {token}"})
    with urlopen(asked, timeout=_ROUND_SECONDS) as answer:
        numbers: dict[str, Any] = json.load(answer)
    return numbers


def ask_totals(state: Path) -> float:
    """Request the totals; return the seconds until the answer."""
    begun = time.perf_counter()
    ask(state, "/totals")
    return round(time.perf_counter() - begun, 3)


def measure(number: int, actives: list[int], directory: Path) -> dict[str, Any]:
    """Fill a store, wake channels, and start servers."""
    store = directory / "store"
    filled = apart(fill, store, number)
    size = sum(file.stat().st_size for file in store.iterdir())
    runs, first = [], 0
    for active in actives:
        before = machine.verifies_per_second()
        numbers = apart(awake, store, first, active, number)
        first += active + WARM + TRACED
        rate = (before + machine.verifies_per_second()) / 2
        runs.append(
            numbers
            | {
                "R_verifies_per_second": round(rate),
                "share_of_R": round(numbers["payments_per_second"] / rate, 4),
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


def show(numbers: dict[str, Any]) -> None:
    table = Table("channels awake", *(f"{each['channels_awake']:,}" for each in numbers["awake"]))
    for key, name in SHOWN.items():
        table.add_row(name, *(f"{each[key]:,}" for each in numbers["awake"]))
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
    for name, each in numbers["start"].items():
        print(
            f"{name} store: listening after {each['listening_after_seconds']} s "
            f"({each['server_cpu_seconds_to_listening']} s of CPU), all seen after {each['all_seen_after_seconds']} s "
            f"({each['server_cpu_seconds_to_all_seen']} s of CPU), {each['private_bytes'] / 1e6:.1f} MB"
        )
    full = numbers["start"]["full"]
    print(f"an idle channel: {numbers['private_bytes_per_idle_channel']} bytes beyond the store")
    print(f"totals: {full['totals_first_seconds']} s, second request {full['totals_again_seconds']} s")


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
            numbers = measure(number, active or [1_000, 10_000], Path(name).resolve())
            numbers["sync_ms_median"] = round(sync_ms(Path(name)), 3)
    except BenchError as error:
        Console(stderr=True, highlight=False).print(f"channels: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    show(numbers)
    if save:
        numbers["durability"] = "fdatasync before every answer, one for each group"
        print(f"Saved as {machine.save(f'channels-{number}', numbers, facts)}")


if __name__ == "__main__":
    typer.run(main)
