"""Measure the store on a disk: synced puts in groups, reads, the scan of the expiry index, opening, and a backup.

    python bench/store.py [--channels N]

It uses LevelDB behind `paychan.store`, with records of open channels, and also measures a sync of the disk alone.
Writes are given for several group sizes: payments that wait while the last group is synced form the next one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import machine
import msgspec
import typer
import uvloop
from crowd import FAR, NETWORK, NOW, client, fill, idle, percentiles
from rich.console import Console
from rich.table import Table
from serve import sync_ms

from paychan.protocol.channel import Channel, State
from paychan.protocol.record import encode_record
from paychan.store.backup import create as backup
from paychan.store.base import Change, Store, walk
from paychan.store.leveldb.store import LevelDbStore

GROUPS = (1, 8, 32, 64, 256)


class Timer:
    """Wall and CPU seconds of a block; the CPU time is that of all threads."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds, self.cpu = time.perf_counter() - wall, time.process_time() - cpu


async def write(store: Store, channels: list[Channel], size: int, count: int) -> tuple[list[Channel], dict[str, Any]]:
    """Replace `number` records, `size` with each sync; return the newest versions and the figures."""
    timer, done = Timer(), 0
    latencies = []
    with timer.measure():
        while done < count:
            begin = done % (len(channels) - size + 1)
            changes = [Change(each, later(each)) for each in channels[begin : begin + size]]
            begun = time.perf_counter()
            assert all(await store.commit(changes))
            latencies.append(time.perf_counter() - begun)
            channels[begin : begin + size] = [change.channel for change in changes]
            done += size
    return channels, {
        "group": size,
        "puts_per_second": round(done / timer.seconds),
        "cpu_us_per_put": round(timer.cpu / done * 1e6, 2),
        **percentiles("group_ms", latencies, 1e3),
    }


def later(channel: Channel) -> Channel:
    """Make the next version of a record, as a payment does."""
    return msgspec.structs.replace(channel, seq=channel.seq + 1, payments=channel.payments + 1)


async def timed(work: Callable[[], Awaitable[Any]], number: int) -> dict[str, Any]:
    """Measure an operation over `number` records."""
    timer = Timer()
    with timer.measure():
        await work()
    return {
        "seconds": round(timer.seconds, 4),
        "us_per_record": round(timer.seconds / number * 1e6, 2),
        "cpu_us_per_record": round(timer.cpu / number * 1e6, 2),
    }


async def measure(directory: Path, number: int) -> dict[str, Any]:
    """Measure everything once on a store of `channels` channels."""
    await fill(directory / "store", number)
    timer, template = Timer(), client(0, FAR)[0]
    with timer.measure():
        store = LevelDbStore.open(directory / "store", NETWORK)
    channels = [idle(template, each) for each in range(min(number, 2_000))]
    reads = []
    for channel in channels:
        begun = time.perf_counter()
        await store.get(channel.outpoint)
        reads.append(time.perf_counter() - begun)

    async def scan() -> None:
        assert len([None async for _ in walk(store, State.OPEN)]) == number

    async def due() -> None:
        assert len(await store.scan(State.OPEN, before=FAR + 100)) == 100

    async def copy() -> None:
        backup.create(store.snapshot, directory / "backups", NETWORK, NOW)

    numbers = {
        "channels": number,
        "record_bytes": len(encode_record(template)),
        "open_ms": round(timer.seconds * 1e3, 1),
        **percentiles("read_us", reads, 1e6),
        "scan": await timed(scan, number),
        "due_100_of_all": await timed(due, 100),
        "backup": await timed(copy, number),
    }
    writes = []
    for size in GROUPS:
        channels, each = await write(store, channels, size, max(200, size * 40))
        writes.append(each)
    await store.close()
    return numbers | {"writes": writes}


def show(numbers: dict[str, Any]) -> None:
    table = Table("puts in a synced group", "puts/s", "share of R", "CPU µs a put", "p50 ms a group", "p99")
    for each in numbers["writes"]:
        keys = ("group", "puts_per_second", "share_of_R", "cpu_us_per_put", "group_ms_p50", "group_ms_p99")
        table.add_row(*(f"{each[key]:,}" for key in keys))
    for column in table.columns:
        column.justify = "right"
    Console().print(table)
    print(
        f"a sync of the disk {numbers['sync_ms_median']} ms; opening {numbers['channels']:,} channels {numbers['open_ms']} ms"
    )
    print(f"reading a record {numbers['read_us_p50']} µs, p99 {numbers['read_us_p99']} µs")
    for key, name in {"scan": "all", "due_100_of_all": "100 that are due", "backup": "a backup"}.items():
        print(f"{name}: {numbers[key]['seconds']} s, {numbers[key]['us_per_record']} µs a record")


def main(
    channels: Annotated[int, typer.Option(min=2_000, help="Records in the store.")] = 100_000,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure the store on this disk."""
    facts, before = machine.facts(), machine.verifies_per_second()
    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk; /tmp may be memory
        numbers = uvloop.run(measure(Path(name).resolve(), channels))
        numbers["sync_ms_median"] = round(sync_ms(Path(name)), 3)
    rate = (before + machine.verifies_per_second()) / 2
    for each in numbers["writes"]:
        each["share_of_R"] = round(each["puts_per_second"] / rate, 4)
    numbers |= {"R_verifies_per_second": round(rate), "durability": "fdatasync of every group"}
    show(numbers)
    if save:
        print(f"Saved as {machine.save('store', numbers, facts)}")


if __name__ == "__main__":
    typer.run(main)
