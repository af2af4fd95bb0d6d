"""Totals of `GET /totals`: channels by state, value at risk, the present cost of settling it, and the reserve.

One pass reads all channels, page by page, so that payments continue meanwhile; a channel costs some twenty
microseconds. If there are many channels, concurrent callers share a pass, and there is a pause between two passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import Struct

from actors.context import Context
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Channel, State
from paychan.protocol.fees import RELAY_FLOOR_SAT_PER_VB, wanted_rate
from paychan.protocol.settlement import Reserve, settlement_size
from paychan.protocol.types import Sat, UnixTime
from paychan.signer_client.base import SignerAbsent, SignerRefused
from paychan.store.base import walk

_UNSETTLED = (State.OPEN, State.CLOSING, State.PUBLISHED)

_LARGEST_DESTINATION = bytes(34)
"""The script with which the state machine judges whether closing is worth its fee: P2WSH and P2TR are the longest."""

_RESERVE_SECONDS = 3.0
"""Longest wait for signer and chain about the reserve; the other totals need neither."""


_MANY_CHANNELS = 10_000
"""Up to this number of channels each request starts a new count."""

_REST = 9
"""Pause after a count of many channels, as a multiple of its duration: counting takes at most a tenth of the time."""

_PATIENCE_SECONDS = 1.0
"""Longest wait for a new count if there is an older one to answer with."""


class ReserveInfo(Struct, frozen=True):
    """Coins that help to pay for settlements; `problem` says why the other fields are null."""

    address: str | None = None
    sat: Sat | None = None
    confirmed_coins: int | None = None
    problem: str | None = None


class Totals(Struct, frozen=True):
    """All channels by state (number and received satoshi), and the cost of settling them."""

    channels: dict[str, int]
    received_sat: dict[str, Sat]
    unsettled_sat: Sat
    """Value at risk: received, but not settled deep in the chain."""
    settling_sat: Sat
    """Fees of settling that value now, each channel alone; a signed settlement counts with its own fee."""
    too_small_channels: int
    """Open channels not worth settling: they stay open until they have received more, or expire."""
    too_small_sat: Sat
    fee_estimate_sat_per_vb: int | None
    fee_floor_sat_per_vb: int
    reserve: ReserveInfo
    next_expiry: UnixTime | None
    awake: int
    counted_at: UnixTime
    """Start time of the count: if there are many channels, the last count is the answer until there is a new one."""


class LatestTotals:
    """The totals, shared by all callers."""

    def __init__(self, context: Context, awake: Callable[[], int]) -> None:
        """`awake` returns the number of actors."""
        self._context, self._awake = context, awake
        self._latest: Totals | None = None
        self._counting: asyncio.Task[Totals] | None = None
        self._again_at = 0.0

    async def get(self) -> Totals:
        """Return a count that began now or not long ago; without an earlier count, wait for the first one.

        Raises:
            StoreFailed: see `Store.scan`.
        """
        loop = asyncio.get_running_loop()
        if self._counting is None and loop.time() >= self._again_at:
            self._counting = loop.create_task(self._count())
        if self._counting is not None:
            counting = asyncio.shield(self._counting)
            await asyncio.wait([counting], timeout=None if self._latest is None else _PATIENCE_SECONDS)
            if counting.done():
                return counting.result()
            counting.cancel()
        assert self._latest is not None  # else a count would have been waited for
        return self._latest

    async def _count(self) -> Totals:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            latest = self._latest = await totals(self._context, self._awake())
        finally:
            self._counting = None
        if sum(latest.channels.values()) > _MANY_CHANNELS:
            self._again_at = loop.time() + _REST * (loop.time() - begun)
        return latest


async def totals(context: Context, awake: int) -> Totals:
    """Count everything; `awake` is the number of actors."""
    counting, begun = _Count(context), context.clock()
    reserve, _ = await asyncio.gather(_reserve(context), counting.run())
    fees = context.chain_view.fees
    return Totals(
        channels={state.value: counting.channels[state] for state in State},
        received_sat={state.value: Sat(counting.received_sat[state]) for state in State},
        unsettled_sat=Sat(sum(counting.received_sat[state] for state in _UNSETTLED)),
        settling_sat=Sat(counting.settling_sat),
        too_small_channels=counting.too_small_channels,
        too_small_sat=Sat(counting.too_small_sat),
        fee_estimate_sat_per_vb=fees.estimate_sat_per_vb,
        fee_floor_sat_per_vb=fees.floor_sat_per_vb,
        reserve=reserve,
        next_expiry=counting.next_expiry,
        awake=awake,
        counted_at=begun,
    )


class _Count:
    """The sums of one pass."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sizes: dict[tuple[str | int, ...], int] = {}
        self._signed = set[bytes]()
        self.channels = dict.fromkeys(State, 0)
        self.received_sat = dict.fromkeys(State, 0)
        self.settling_sat = 0
        self.too_small_channels = 0
        self.too_small_sat = 0
        self.next_expiry: UnixTime | None = None

    async def run(self) -> None:
        now = self._context.paying_time()
        for state in State:
            async for channel in walk(self._context.store, state):
                self.channels[state] += 1
                self.received_sat[state] += channel.received_sat
                if state in _UNSETTLED:
                    self._add_cost(channel, now)
                if state is State.OPEN and self.next_expiry is None:
                    self.next_expiry = channel.terms.expiry.unix_time  # the earliest comes first

    def _add_cost(self, channel: Channel, now: UnixTime) -> None:
        rules, signed = self._context.rules, channel.closing.settlement if channel.closing else None
        if signed is not None:
            self.settling_sat += 0 if signed.txid in self._signed else signed.fee_sat
            self._signed.add(signed.txid)
            return
        size = self._size(channel)
        if channel.state is State.OPEN and channel.received_sat < size * RELAY_FLOOR_SAT_PER_VB + rules.dust_sat:
            self.too_small_channels += 1
            self.too_small_sat += channel.received_sat
        else:
            self.settling_sat += size * wanted_rate(channel, rules, now, self._context.chain_view.fees)

    def _size(self, channel: Channel) -> int:
        """Size of its settlement, computed once for all channels whose parts have the same lengths."""
        terms, sizes = channel.terms, (len(channel.payment.signature), len(channel.change_script))
        lengths = (terms.tag, channel.payment.has_change, *sizes, terms.expiry.lock_time.bit_length())
        if lengths not in self._sizes:
            self._sizes[lengths] = settlement_size([channel.claim], _LARGEST_DESTINATION)
        return self._sizes[lengths]


async def _reserve(context: Context) -> ReserveInfo:
    address = None
    try:
        async with asyncio.timeout(_RESERVE_SECONDS):
            reserve = Reserve(await context.signer.reserve_key())
            address = reserve.funding_address(context.network)
            coins = await context.chain.funding(reserve)
    except (SignerAbsent, SignerRefused, ChainFailed) as error:
        return ReserveInfo(address, problem=str(error))
    except TimeoutError:
        peer = "signer" if address is None else "chain"
        return ReserveInfo(address, problem=f"no answer of the {peer} within {_RESERVE_SECONDS:.0f} s")
    confirmed = sum(coin.confirmations > 0 for coin in coins)
    return ReserveInfo(address, Sat(sum(coin.value_sat for coin in coins)), confirmed)
