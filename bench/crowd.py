"""Stores of many channels, and the cost of waking some of them: real actors, group commit and LevelDB, no HTTP."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
from coincurve import PrivateKey

from actors.context import Context
from actors.group_commit import GroupCommit
from actors.registry import Registry
from actors.roles import Settling
from actors.watching.expiry import Watcher
from paychan.chain.debug import DebugChain
from paychan.protocol.address import key_script
from paychan.protocol.channel import Accepted, Channel, Pay, Rules, State
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.expiry import Expiry
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import Payment, sign_payment
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.signer_client.unix import UnixSigner
from paychan.store.base import Change, Store
from paychan.store.leveldb.store import LevelDbStore

NETWORK = "debug"
NOW = UnixTime(1_500_000_000)
EXPIRY = UnixTime(NOW + 30 * 86_400)
FAR = UnixTime(2_000_000_000)
"""Expiry of stored channels: far in the future, also by today's clock."""
RULES = Rules(Sat(700), 0, 6 * 3600, 12 * 3600, 40)
SERVER_KEY = PrivateKey(b"\x01" * 32).public_key.format()

WARM = 100
"""Channels used before the measurement begins."""

IN_FLIGHT = 32
"""Payments in flight: the number of connections in the published figures for whole servers."""

TRACED = 500
"""Channels whose memory is counted per allocation, which slows everything down."""

_GROUP = 1_000


def client(number: int, expiry: UnixTime = EXPIRY) -> tuple[Channel, Payment]:
    """Make an open channel that received 100,000 sat, and its next payment, of 1 sat."""
    key = PrivateKey(sha256(number.to_bytes(8, "big")).digest())
    public = key.public_key.format()
    terms, outpoint, script = make_terms(SERVER_KEY, public, expiry), debug_outpoint(public, expiry), key_script(public)
    newest, following = (
        sign_payment(key, terms, outpoint, DEBUG_FUNDING_SAT, script, Sat(DEBUG_FUNDING_SAT - paid))
        for paid in (100_000, 100_001)
    )
    opened = Channel(terms, outpoint, DEBUG_FUNDING_SAT, script, newest, State.OPEN, seq=1, opened_at=NOW)
    return opened, following


def idle(template: Channel, number: int) -> Channel:
    """Make an open channel that is only stored: its signature belongs to the template."""
    outpoint = OutPoint(sha256(b"idle" + number.to_bytes(8, "big")).digest(), number % 3)
    expiry = UnixTime(template.terms.expiry.lock_time + number % 30_000_000)
    terms = msgspec.structs.replace(template.terms, expiry=Expiry(expiry))
    return msgspec.structs.replace(template, outpoint=outpoint, terms=terms)


# --- in a separate process ------------------------------------------------------------------------------------------


async def fill(directory: Path, number: int) -> float:
    """Store `number` idle channels; return the seconds that this took."""
    template, begun = client(0, FAR)[0], time.perf_counter()
    store = LevelDbStore.open(directory, NETWORK)
    for begin in range(0, number, _GROUP):
        end = min(begin + _GROUP, number)
        await store.commit([Change(None, idle(template, each)) for each in range(begin, end)])
    await store.close()
    return time.perf_counter() - begun


@dataclass(frozen=True)
class Ask:
    """A channel to wake: its newest payment again, which changes nothing, then its next payment."""

    outpoint: OutPoint
    again: Pay
    following: Pay


async def fill_active(directory: Path, first: int, number: int) -> list[Ask]:
    """Store `number` channels that can take payments."""
    store, asks = LevelDbStore.open(directory, NETWORK), list[Ask]()
    for begin in range(first, first + number, _GROUP):
        made = [client(each, FAR) for each in range(begin, min(begin + _GROUP, first + number))]
        await store.commit([Change(None, channel) for channel, _ in made])
        asks += [Ask(channel.outpoint, Pay(channel.payment), Pay(following)) for channel, following in made]
    await store.close()
    return asks


@asynccontextmanager
async def server(directory: Path) -> AsyncIterator[tuple[Store, Registry, Watcher]]:
    """Run the server's parts below its HTTP interface."""
    store = LevelDbStore.open(directory, NETWORK)
    commits = GroupCommit(store, 0, failed)
    signer = UnixSigner(directory / "no signer", 1.0)  # payments need no signer
    context = Context(Network.TEST, RULES, 6, lambda: NOW, store, commits, DebugChain(lambda: NOW), signer)
    registry = Registry(context)
    settling = Settling(context, registry, interval_seconds=30, alarm_seconds=7_200, idle_seconds=300)
    yield store, registry, settling.watcher
    await commits.close()
    await store.close()


async def awake(directory: Path, first: int, number: int, others: int) -> dict[str, Any]:
    """Wake channels beside `others` idle ones, and pay once over each of them."""
    asks = await fill_active(directory, first, number + WARM + TRACED)
    begun = time.perf_counter()
    async with server(directory) as (store, registry, watcher):
        await watcher.scan()
        first_look = time.perf_counter() - begun
        while registry.before_waking is not None:  # the first scan over all channels
            await watcher.scan()
        numbers = {"first_look_ms": round(first_look * 1e3, 1), "round_seconds": round(time.perf_counter() - begun, 2)}
        for ask in asks[:WARM]:
            await registry.ask(ask.outpoint, ask.again)
            await registry.ask(ask.outpoint, ask.following)
        reads = await read(store, min(others, 2_000))
        gc.collect()
        memory = private_bytes()
        woken = await wake(registry, asks[WARM + TRACED :])
        paid, seconds = await pay(registry, asks[WARM + TRACED :])
        gc.collect()
        memory = private_bytes() - memory
        traced = await trace(registry, asks[WARM : WARM + TRACED])
    return numbers | {
        "channels_awake": number,
        "bytes_per_awake_channel": round(memory / number),
        "python_bytes_per_awake_channel": round(traced),
        **percentiles("read_us", reads, 1e6),
        **percentiles("wake_us", woken, 1e6),
        "payments_per_second": round(len(paid) / seconds),
        **percentiles("payment_ms", paid, 1e3),
    }


async def read(store: Store, number: int) -> list[float]:
    """Read idle channels; return the seconds that each took."""
    template, latencies = client(0, FAR)[0], []
    for each in range(number):
        outpoint = idle(template, each).outpoint
        begun = time.perf_counter()
        assert await store.get(outpoint) is not None
        latencies.append(time.perf_counter() - begun)
    return latencies


async def wake(registry: Registry, asks: list[Ask]) -> list[float]:
    """Wake the channels one after another; return the seconds that each took."""
    latencies = []
    for ask in asks:
        begun = time.perf_counter()
        await registry.ask(ask.outpoint, ask.again)
        latencies.append(time.perf_counter() - begun)
    return latencies


async def pay(registry: Registry, asks: list[Ask]) -> tuple[list[float], float]:
    """Pay once over each channel, some at a time; return the seconds of each payment, and of all together."""
    begun, left = time.perf_counter(), iter(asks)
    latencies = list(chain(*await asyncio.gather(*(_pay(registry, left) for _ in range(IN_FLIGHT)))))
    return latencies, time.perf_counter() - begun


async def _pay(registry: Registry, asks: Iterator[Ask]) -> list[float]:
    latencies = []
    for ask in asks:
        begun = time.perf_counter()
        outcome = await registry.ask(ask.outpoint, ask.following)
        latencies.append(time.perf_counter() - begun)
        if not isinstance(outcome, Accepted) or outcome.value_sat != 1:
            raise RuntimeError(outcome)
    return latencies


async def trace(registry: Registry, asks: list[Ask]) -> float:
    """Wake channels and pay; return the bytes per channel that Python allocated and still holds."""
    gc.collect()
    tracemalloc.start()
    await pay(registry, asks)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return kept / len(asks)


def percentiles(name: str, seconds: list[float], factor: float) -> dict[str, float]:
    """Return median and 99th percentile, multiplied by `factor` (units per second)."""
    at = sorted(seconds) or [0.0]
    return {f"{name}_p{each}": round(at[len(at) * each // 100] * factor, 3) for each in (50, 99)}


def private_bytes(process: int | str = "self") -> int:
    """Return the anonymous memory of a process. LevelDB's mapped tables do not count: the kernel can reclaim them."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def failed(error: BaseException) -> None:
    msg = f"store failed: {error}"
    raise SystemExit(msg)
