"""What `GET /totals` says: channels by state, what is at risk, what settling it would cost now, and what could help to pay.

One pass over all channels, page by page, so that payments go on meanwhile; a channel costs some twenty microseconds. So
where there are many, those who ask share a pass, and between two of them is time.
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
"""As the channel machine judges whether closing is worth it: P2WSH and P2TR."""

_RESERVE_SECONDS = 3.0
"""Longer nobody waits for signer and chain here; the rest is known without them."""


_MANY_CHANNELS = 10_000
"""Fewer are counted for each who asks."""

_REST = 9
"""Counting many takes no more than one of so many and one parts of the time."""

_PATIENCE_SECONDS = 1.0
"""Longer nobody waits for a new count while there is an older one."""


class ReserveInfo(Struct, frozen=True):
    """Coins that help to pay for settlements; `problem` says why what is null could not be told."""

    address: str | None = None
    sat: Sat | None = None
    confirmed_coins: int | None = None
    problem: str | None = None


class Totals(Struct, frozen=True):
    """All channels by state: number, and satoshi received in them; and the economy of settling them."""

    channels: dict[str, int]
    received_sat: dict[str, Sat]
    unsettled_sat: Sat
    """At risk: received, and not deep in the chain."""
    settling_sat: Sat
    """Fees of settling all that now, each channel alone; what is signed already counts as signed."""
    too_small_channels: int
    """Open, and not worth settling: they stay open until they have received more, or expire."""
    too_small_sat: Sat
    fee_estimate_sat_per_vb: int | None
    fee_floor_sat_per_vb: int
    reserve: ReserveInfo
    next_expiry: UnixTime | None
    awake: int
    counted_at: UnixTime
    """When counting began: of many channels, the last count is told until there is a new one."""


class LatestTotals:
    """The totals for all who ask."""

    def __init__(self, context: Context, awake: Callable[[], int]) -> None:
        """`awake` tells the number of actors."""
        self._context, self._awake = context, awake
        self._latest: Totals | None = None
        self._counting: asyncio.Task[Totals] | None = None
        self._again_at = 0.0

    async def get(self) -> Totals:
        """Return a count that began now or not long ago; the first of many channels is waited for.

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
        self._sizes: dict[tuple[int, ...], int] = {}
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
                    self.next_expiry = channel.terms.expiry  # the earliest comes first

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
        """Size of its settlement, laid out once for all whose parts have the same lengths."""
        payment, expiry = channel.payment, channel.terms.expiry
        lengths = (payment.flag, len(payment.signature), len(channel.change_script), expiry.bit_length())
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
        who = "signer" if address is None else "chain"
        return ReserveInfo(address, problem=f"no answer of the {who} within {_RESERVE_SECONDS:.0f} s")
    confirmed = sum(coin.confirmations > 0 for coin in coins)
    return ReserveInfo(address, Sat(sum(coin.value_sat for coin in coins)), confirmed)
