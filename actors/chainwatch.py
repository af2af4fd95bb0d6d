"""Keeps the view of the chain: the newest tip, whether it can be trusted, and whether each funding output is there.

Fail closed: while the node does not answer or its tip is old, no payment is accepted; while a channel's funding output
is not there as it should be, that channel takes none. Both end by themselves. Closing goes on all the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import structlog

from actors.registry import Registry
from actors.world import World
from paychan.chain.base import ChainFailed, Funding, Tip
from paychan.protocol.channel import Channel, SpentElsewhere, State, Vanished
from paychan.protocol.types import OutPoint, UnixTime
from paychan.store.base import walk

log = structlog.get_logger("chain")

_PAGE = 1000
"""Outputs asked about in one go."""

_CLOCK_SKEW_SECONDS = 7200
"""Bitcoin nodes take blocks up to two hours ahead of their clock; one further ahead means that ours is wrong."""

REMEMBERED_SECONDS = 30 * 86_400
"""Channels that expired longer ago are not looked at again: no reorg goes back so far."""

_FUNDED_BEFORE_SECONDS = 14 * 86_400
"""Funding outputs are assumed to be no older than this when their channel is opened; only a lost wallet needs it."""

_FIRST = OutPoint(bytes(32), 0)


class ChainWatch:
    """Looks at the chain for the watcher."""

    def __init__(self, world: World, registry: Registry, stale_seconds: int) -> None:
        self._world = world
        self._registry = registry
        self._stale_seconds = stale_seconds
        self._watched: set[OutPoint] = set()
        self._all_seen_at = ""
        self._closed_seen_at: Tip | None = None
        self._closed_after: tuple[UnixTime, OutPoint] | None = None
        self.alarms: tuple[str, ...] = ()

    async def wait(self, seconds: float) -> None:
        """Wait for a new block or another change, at most so long."""
        tip = self._world.chain_view.tip
        try:
            if tip is not None and not self._world.chain_view.problem:
                await self._world.chain.wait_for_change(tip, seconds)
                return
        except ChainFailed:
            pass
        await asyncio.sleep(min(seconds, 1.0))

    async def look(self) -> bool:
        """Take a fresh look; when the chain can't be asked, say so and stop accepting. Whether there is a new block."""
        seen, before = self._world.chain_view, self._all_seen_at
        try:
            seen.tip = await self._world.chain.tip()
            problem = self._tip_problem(seen.tip)
            await self._look_at_funding(seen.tip)
            seen.fees = await self._world.chain.fees()
        except ChainFailed as error:
            problem = f"the chain can't be asked: {error}"
        if problem != seen.problem:
            log.error("frozen", reason=problem) if problem else log.info("accepting payments again")
        seen.problem = problem
        self.alarms = tuple(filter(None, (problem, self._skew(seen.tip))))
        return self._all_seen_at != before

    def _tip_problem(self, tip: Tip) -> str:
        age = self._world.clock() - tip.time
        if self._stale_seconds and age > self._stale_seconds:
            return f"the newest block is {age // 60} minutes old, limit {self._stale_seconds // 60}"
        return ""

    def _skew(self, tip: Tip | None) -> str:
        ahead = tip.time - self._world.clock() if tip is not None else 0
        return f"our clock is {ahead} seconds behind the newest block" if ahead > _CLOCK_SKEW_SECONDS else ""

    async def _look_at_funding(self, tip: Tip) -> None:
        """Compare open channels with what the chain shows; follow the scripts of all that is unfinished.

        After a new block all of them; else only those whose output may come or go without one.
        """
        seen, open_ones = self._world.chain_view, State.OPEN
        doubtful = {*seen.in_danger, *seen.unconfirmed}
        if tip.block_hash != self._all_seen_at:
            for state in (State.CLOSING, State.PUBLISHED):
                async for page in _pages(walk(self._world.store, state)):
                    await self._follow(page)
            async for page in _pages(walk(self._world.store, open_ones)):
                await self._follow(page)
                await self._judge_all(page)
            self._all_seen_at = tip.block_hash
        records = [await self._registry.read(outpoint) for outpoint in doubtful]
        await self._judge_all([record for record in records if record is not None and record.state is open_ones])
        for outpoint, record in zip(doubtful, records, strict=True):
            if record is None or record.state is not open_ones:
                seen.in_danger.pop(outpoint, None)
            if record is None or record.state in (State.CLOSED, State.LOST):
                seen.unconfirmed.pop(outpoint, None)

    async def _judge_all(self, channels: Sequence[Channel]) -> None:
        if channels:
            unspent = await self._world.chain.unspent([channel.outpoint for channel in channels])
            for channel in channels:
                await self._judge(channel, unspent.get(channel.outpoint))

    async def _follow(self, page: Sequence[Channel]) -> None:
        """Follow what we don't yet; a chain that has lost what it followed finds it from before the opening on."""
        new = [channel for channel in page if channel.outpoint not in self._watched]
        if new:
            since = min(channel.opened_at for channel in new) - _FUNDED_BEFORE_SECONDS
            await self._world.chain.watch([channel.terms for channel in new], UnixTime(max(0, since)))
            self._watched.update(channel.outpoint for channel in new)

    async def look_at_closed(self) -> None:
        """Take up again the closed channels whose settlement is not deep enough any more: at start, after each reorg.

        One page of them a look, so that nothing else waits for it.
        """
        tip = self._world.chain_view.tip
        if tip is None or not tip.height or self._world.chain_view.problem:  # without blocks there are no reorgs
            return
        try:
            if self._closed_seen_at is None or not await self._world.chain.holds(self._closed_seen_at):
                self._closed_after = (UnixTime(max(0, self._world.now() - REMEMBERED_SECONDS)), _FIRST)
            if self._closed_after is not None:
                page = await self._world.store.scan(State.CLOSED, after=self._closed_after, limit=_PAGE)
                await self._follow(page)
                for channel in page:
                    await self._judge_closed(channel)
                self._closed_after = (page[-1].terms.expiry, page[-1].outpoint) if len(page) == _PAGE else None
        except ChainFailed as error:
            log.warning("can't look at closed channels", reason=str(error))
        else:
            self._closed_seen_at = tip

    async def _judge_closed(self, channel: Channel) -> None:
        spend = await self._world.chain.spender(channel.outpoint)
        if spend is None or spend.confirmations < self._world.depth(channel):
            log.error("settlement is not confirmed any more", channel=str(channel.outpoint))
            await self._registry.ask(channel.outpoint, Vanished())

    async def _judge(self, channel: Channel, funding: Funding | None) -> None:
        """Freeze a channel whose funding is not there, thaw one whose is again, end one that something else spent."""
        seen, need = self._world.chain_view, self._world.rules.confirmations_needed(channel.funding_sat)
        danger, reason = seen.in_danger, ""
        if funding is not None and funding.confirmations == 0:
            seen.unconfirmed[channel.outpoint] = channel.funding_sat
        else:
            seen.unconfirmed.pop(channel.outpoint, None)
        if funding is None:
            spend = await self._world.chain.spender(channel.outpoint)
            if spend is not None and spend.confirmations >= self._world.settlement_confirmations:
                log.error("funding was spent by another", channel=str(channel.outpoint), txid=spend.txid[::-1].hex())
                await self._registry.ask(channel.outpoint, SpentElsewhere(spend.txid))
                danger.pop(channel.outpoint, None)
                return
            reason = "its funding output is gone" if spend is None else "its funding output is being spent"
        elif funding.confirmations < need:
            reason = f"its funding output has {funding.confirmations} confirmations, need {need}"
        if reason == danger.get(channel.outpoint, ""):
            return
        log.warning("channel frozen" if reason else "channel thawed", channel=str(channel.outpoint), reason=reason)
        if reason:
            danger[channel.outpoint] = reason
        else:
            danger.pop(channel.outpoint)


async def _pages(channels: AsyncIterator[Channel]) -> AsyncIterator[list[Channel]]:
    """Gather channels, so that the chain is asked about many in one go."""
    page: list[Channel] = []
    async for channel in channels:
        page.append(channel)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page
