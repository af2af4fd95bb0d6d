"""Ends of channels on the chain, and their return: spent by a settlement, spent by a refund, or never funded.

A record follows the chain in every state. A record takes over a settlement that it lacks (`protocol.finding`). A deep
refund makes a channel LOST; if a reorg removes the refund, the server settles the channel after all. If a funding
output is neither unspent nor spent for the number of blocks that ends a channel, its transaction was replaced: the
channel becomes UNFUNDED, and returns when the output does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from actors.context import Context
from actors.registry import Registry
from actors.settling.spends import judge_spend
from paychan.chain.base import ChainFailed, Spend, Tip
from paychan.protocol.channel import Channel, Found, Funded, State, Unfunded, Vanished
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.types import OutPoint
from paychan.store.base import get_readable

log = structlog.get_logger("endings")

REMEMBERED_SECONDS = 30 * 86_400
"""Channels that expired longer ago are not scanned again: no reorg goes back that far."""

_BACK = "its funding is in the chain again"
_UNASKED = "its funding is in the chain again, and the server has not asked the signer about it yet"

_PAGE = 1000
_FIRST = OutPoint(bytes(32), 0)

Follow = Callable[[Sequence[Channel]], Awaitable[None]]


class Endings:
    """Compares ended and ending channels with the chain, for `ChainWatch`."""

    def __init__(self, context: Context, registry: Registry, follow: Follow) -> None:
        self._context = context
        self._registry = registry
        self._follow = follow
        self._missing_since: dict[OutPoint, int] = {}
        """Height of the tip at which a funding output was missing first."""
        self._unjudged = set[OutPoint]()
        """Ended channels about which the chain gave no answer."""
        self._ended_seen_at: Tip | None = None
        self._ended_after: dict[State, tuple[int, OutPoint]] = {}

    # --- channels that have not ended -------------------------------------------------------------------------------

    def note_present(self, outpoint: OutPoint) -> None:
        """Note that a funding output is unspent, or that its spend is known."""
        self._missing_since.pop(outpoint, None)

    async def judge_missing(self, channel: Channel) -> str:
        """Judge an open channel whose funding output is not unspent; return why it accepts no payments."""
        spend = await self.spender_of(channel)
        if spend is None:
            return "its funding output is gone"
        await self._tell(channel, spend)
        return "its funding output is being spent"

    async def spender_of(self, channel: Channel) -> Spend | None:
        """Find the spend of an output that is not unspent; without a spend, count the blocks without the output."""
        spend = await self._context.chain.spender(channel.outpoint)
        if spend is None:
            await self._count_missing(channel)
        else:
            self.note_present(channel.outpoint)
        return spend

    async def _tell(self, channel: Channel, spend: Spend) -> None:
        command = await judge_spend(channel, spend, self._context)
        if command is None or (channel.state is State.LOST and spend.txid in _known(channel)):
            return
        txid = spend.txid[::-1].hex()
        if isinstance(command, Found):
            log.warning("a settlement that the record lacks", channel=str(channel.outpoint), txid=txid)
        else:
            log.error("another party spent the funding output", channel=str(channel.outpoint), txid=txid)
        await self._registry.ask(channel.outpoint, command)

    async def _count_missing(self, channel: Channel) -> None:
        """Count the blocks without a funding output, while the chain view is reliable."""
        seen = self._context.chain_view
        if seen.tip is None or seen.problem:
            return
        since = self._missing_since.setdefault(channel.outpoint, seen.tip.height)
        if seen.tip.height - since < self._context.settlement_confirmations:
            return
        if await self._is_there_now(channel, seen.tip):
            return
        self._missing_since.pop(channel.outpoint, None)
        log.error("never funded", channel=str(channel.outpoint), received_sat=channel.received_sat)
        await self._registry.ask(channel.outpoint, Unfunded())

    async def _is_there_now(self, channel: Channel, tip: Tip) -> bool:
        """Ask once more: the last answer of the chain may be older than the tip, for example during a reorg."""
        chain = self._context.chain
        there = channel.outpoint in await chain.unspent([channel.outpoint]) or await chain.tip() != tip
        if there:
            self.note_present(channel.outpoint)
        return there

    # --- channels that have ended -----------------------------------------------------------------------------------

    async def scan_unfunded(self, *, spent: bool) -> None:
        """Reopen UNFUNDED channels whose funding is in the chain again; with `spent` also look for a spend of it."""
        after: tuple[int, OutPoint] | None = self._oldest()
        while after is not None:
            page = await self._context.store.scan(State.UNFUNDED, after=after, limit=_PAGE)
            unspent = await self._context.chain.unspent([channel.outpoint for channel in page]) if page else {}
            for channel in page:
                funding = unspent.get(channel.outpoint)
                if funding is not None:
                    log.warning("funded after all", channel=str(channel.outpoint))
                    self._context.chain_view.unasked[channel.outpoint] = _UNASKED
                    self._context.chain_view.in_danger.setdefault(channel.outpoint, _BACK)  # until the next scan
                    await self._registry.ask(channel.outpoint, Funded())
                elif spent:
                    await self._each(channel, self._judge_unfunded)
            after = _place(page[-1]) if len(page) == _PAGE else None

    def scan_all_again(self) -> None:
        """Scan all ended channels once more, as after a start."""
        self._ended_seen_at = None

    async def scan_ended(self) -> None:
        """Reopen the settlement of channels whose last transaction is no longer deep: at start, and after each reorg.

        A call scans one page of each state, so that no other work waits for it.
        """
        tip = self._context.chain_view.tip
        if tip is None or not tip.height or self._context.chain_view.problem:  # without blocks there are no reorgs
            return
        try:
            if self._ended_seen_at is None or not await self._context.chain.holds(self._ended_seen_at):
                self._ended_after = dict.fromkeys((State.CLOSED, State.LOST), self._oldest())
            for state, after in list(self._ended_after.items()):
                page = await self._context.store.scan(state, after=after, limit=_PAGE)
                await self._follow(page)
                for channel in page:
                    await self._each(channel, self._judge_ended)
                if len(page) == _PAGE:
                    self._ended_after[state] = _place(page[-1])
                else:
                    del self._ended_after[state]
        except ChainFailed as error:
            log.warning("can't scan ended channels", reason=str(error))
        else:
            self._ended_seen_at = tip
        for outpoint in [*self._unjudged]:
            record = await get_readable(self._context.store, outpoint)
            self._unjudged.discard(outpoint)
            if record is not None and record.state in (State.CLOSED, State.LOST):
                await self._each(record, self._judge_ended)

    async def _each(self, channel: Channel, judge: Callable[[Channel], Awaitable[None]]) -> None:
        """Judge one channel; if chain or store fail for it, the others continue, and a later scan asks again."""
        try:
            await judge(channel)
        except (ChainFailed, DamagedRecord) as error:
            log.warning("unknown how a channel ended", channel=str(channel.outpoint), reason=str(error))
            self._unjudged.add(channel.outpoint)

    async def _judge_unfunded(self, channel: Channel) -> None:
        spend = await self._context.chain.spender(channel.outpoint)
        if spend is not None and spend.confirmations:
            await self._tell(channel, spend)

    async def _judge_ended(self, channel: Channel) -> None:
        spend = await self._context.chain.spender(channel.outpoint)
        if spend is not None and spend.confirmations >= self._context.depth(channel):
            if channel.state is State.LOST or spend.txid not in _known(channel):
                await self._tell(channel, spend)
            return
        if channel.state is State.LOST:
            if spend is None and not await self._context.chain.unspent([channel.outpoint]):
                return  # unknown: another output may have replaced the funding, or the chain view has a gap
            if spend is not None and isinstance(await judge_spend(channel, spend, self._context), Found):
                await self._tell(channel, spend)
                return
        log.error("the transaction that ended the channel is no longer deep", channel=str(channel.outpoint))
        await self._registry.ask(channel.outpoint, Vanished())

    def _oldest(self) -> tuple[int, OutPoint]:
        """Start of the channels that may return, in the store's order of expiries."""
        return max(0, self._context.acting_time() - REMEMBERED_SECONDS), _FIRST


def _place(channel: Channel) -> tuple[int, OutPoint]:
    return channel.terms.expiry.lock_time, channel.outpoint


def _known(channel: Channel) -> set[bytes]:
    """Txid of the transaction that ended the channel, by its record; an empty set if there is none."""
    closing = channel.closing
    if closing is None:
        return set()
    return {closing.spent_by} if closing.spent_by else {closing.settlement.txid} if closing.settlement else set()
