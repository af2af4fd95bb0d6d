"""What an open channel costs: memory of an actor, time to wake one, and a payment while many are awake.

    python bench/channels.py [NUMBER …]

In one process and without HTTP: the real actors, group commit and LevelDB, payments really signed and verified.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import machine
import psutil  # type: ignore[import-untyped]  # has no stubs
import typer
import uvloop
from coincurve import PrivateKey
from rich.console import Console
from rich.table import Table

from actors.commit import GroupCommit
from actors.registry import Registry
from actors.world import World
from paychan.chain.debug import DebugChain
from paychan.protocol.address import key_script
from paychan.protocol.channel import Accepted, Channel, Pay, Rules, State
from paychan.protocol.debugfunding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.payment import Payment, sign_payment
from paychan.protocol.scripts import make_terms
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.signing.unix import UnixSigner
from paychan.store.base import Change
from paychan.store.leveldb import LevelDbStore

NOW = UnixTime(1_500_000_000)
EXPIRY = UnixTime(NOW + 30 * 86_400)
RULES = Rules(Sat(700), 0, 6 * 3600, 12 * 3600, 40)
SERVER_KEY = PrivateKey(b"\x01" * 32).public_key.format()

WARM = 100
"""Channels used before anything is measured."""

IN_FLIGHT = 32
"""Payments at a time, as many as connections in our figures for whole servers."""


def client(number: int) -> tuple[Channel, Payment]:
    """Make an open channel that received 100,000 sat, and its next payment, of 1 sat."""
    key = PrivateKey(sha256(number.to_bytes(8, "big")).digest())
    public = key.public_key.format()
    terms, outpoint, script = make_terms(SERVER_KEY, public, EXPIRY), debug_outpoint(public, EXPIRY), key_script(public)
    newest, following = (
        sign_payment(key, terms, outpoint, script, Sat(DEBUG_FUNDING_SAT - paid)) for paid in (100_000, 100_001)
    )
    opened = Channel(terms, outpoint, DEBUG_FUNDING_SAT, script, newest, State.OPEN, seq=1, opened_at=NOW)
    return opened, following


async def measure(number: int, directory: Path) -> dict[str, Any]:
    """Wake so many channels, and pay once over each of them."""
    store = LevelDbStore.open(directory, "bench")
    commits = GroupCommit(store, 0, failed)
    signer = UnixSigner(directory / "no signer", 1.0)  # payments need none
    world = World(Network.TEST, RULES, 6, lambda: NOW, store, commits, DebugChain(), signer)
    registry = Registry(world)
    asks = []
    for begin in range(0, number + WARM, 1_000):
        made = [client(each) for each in range(begin, min(begin + 1_000, number + WARM))]
        await store.commit([Change(None, channel) for channel, _ in made])
        asks += [(channel.outpoint, Pay(channel.payment), Pay(following)) for channel, following in made]

    for outpoint, again, following in asks[:WARM]:
        await registry.ask(outpoint, again)
        await registry.ask(outpoint, following)
    gc.collect()
    memory, begun = psutil.Process().memory_info().rss, time.perf_counter()
    for outpoint, again, _ in asks[WARM:]:
        await registry.ask(outpoint, again)
    wake_seconds = time.perf_counter() - begun
    gc.collect()
    memory = psutil.Process().memory_info().rss - memory

    paid = iter(asks[WARM:])
    begun = time.perf_counter()
    latencies = sorted(chain(*await asyncio.gather(*(pay(registry, paid) for _ in range(IN_FLIGHT)))))
    pay_seconds = time.perf_counter() - begun
    await commits.close()
    await store.close()
    return {
        "channels": number,
        "bytes_per_channel": round(memory / number),
        "wake_us": round(wake_seconds / number * 1e6, 1),
        "payments_per_second": round(len(latencies) / pay_seconds),
        "payment_ms_p50": round(latencies[len(latencies) // 2] * 1e3, 3),
        "payment_ms_p99": round(latencies[len(latencies) * 99 // 100] * 1e3, 3),
    }


async def pay(registry: Registry, asks: Iterator[tuple[Any, Pay, Pay]]) -> list[float]:
    """Send one payment after the other, each over another channel; return how long each took."""
    latencies = []
    for outpoint, _, payment in asks:
        begun = time.perf_counter()
        outcome = await registry.ask(outpoint, payment)
        latencies.append(time.perf_counter() - begun)
        if not isinstance(outcome, Accepted) or outcome.value_sat != 1:
            raise RuntimeError(outcome)
    return latencies


def failed(error: BaseException) -> None:
    msg = f"store failed: {error}"
    raise SystemExit(msg)


def main(
    numbers: Annotated[
        list[int] | None, typer.Argument(min=1, help="Channels awake.", show_default="1000 10000")
    ] = None,
    save: Annotated[bool, typer.Option(help="Keep the figures in bench/results.")] = True,
) -> None:
    """Measure memory and latency against the number of channels that are awake."""
    facts, rate = machine.facts(), machine.verifies_per_second()
    table = Table("channels awake", "bytes each", "wake µs", "payments/s", "share of R", "p50 ms", "p99 ms")
    told = []
    for number in numbers or (1_000, 10_000):
        with tempfile.TemporaryDirectory(dir=".") as directory:  # on a disk; /tmp may be memory
            figures = uvloop.run(measure(number, Path(directory) / "store"))
        told.append(figures)
        share = figures["payments_per_second"] / rate
        table.add_row(
            f"{number:,}",
            f"{figures['bytes_per_channel']:,}",
            str(figures["wake_us"]),
            f"{figures['payments_per_second']:,}",
            f"{share:.3f}",
            str(figures["payment_ms_p50"]),
            str(figures["payment_ms_p99"]),
        )
    for column in table.columns:
        column.justify = "right"
    Console().print(table)
    if save:
        print(f"Saved as {machine.save('channels', {'R_verifies_per_second': round(rate), 'runs': told}, facts)}")


if __name__ == "__main__":
    typer.run(main)
