"""Updates the chain view: the newest tip, whether the tip is reliable, and the state of each funding output.

It fails closed: while the node does not answer or its tip is old, the server accepts no payments. While a channel's
funding output is missing or not deep enough, that channel accepts none. Both end by themselves. Closing always works.

After each block the watch scans all open channels in a *round*. It scans one page at a time, so that neither payments
nor due settlements wait for the end of the round, and it stores no state per channel. Until the first round since the
start has ended, a channel that is woken before its turn is scanned first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import structlog

from actors.alarm import Alarm, Kind
from actors.context import Context
from actors.registry import Registry
from actors.watching.endings import Endings
from paychan.chain.base import ChainFailed, Funding, Tip
from paychan.protocol.channel import Channel, State
from paychan.protocol.moment import LEAD_SECONDS, is_believed, leads, stepped
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.withdrawing import can_withdraw
from paychan.shared.wording import clock
from paychan.store.base import walk

log = structlog.get_logger("chain")

_PAGE = 1000
"""Most outputs in one request to the chain."""

_FUNDED_BEFORE_SECONDS = 14 * 86_400
"""Assumed maximum age of a funding output when its channel opens; used only if the node's wallet was lost."""

_SETTLING = (State.CLOSING, State.PUBLISHED)

_WAKING_SECONDS = 5.0
"""Longest time that a payment waits for its channel's funding scan; after that the channel is unverified."""

_UNVERIFIED_SECONDS = 1.0
"""Least time between two scans of the unverified channels during a round."""

_UNSEEN = "the server could not check its funding output since the start"


class ChainWatch:
    """Scans the chain for the watcher."""

    def __init__(self, context: Context, registry: Registry, stale_seconds: int) -> None:
        self._context = context
        self._registry = registry
        self._stale_seconds = stale_seconds
        self._all_seen_at = ""
        self._round_at = ""
        """Hash of the tip at which the present round began; empty between rounds."""
        self._round_tip: Tip | None = None
        """The tip at which the newest round began."""
        self._round_after: tuple[int, OutPoint] | None = None
        self._page_seconds = 0.0
        self._unverified_scanned_at = 0.0
        self._follows_unfinished = False
        self._follows_open = False
        self._memory: int | None = None
        self._first_scans: dict[OutPoint, asyncio.Task[None]] = {}
        self._withdrawable: list[Channel] = []
        self.endings = Endings(context, registry, self._follow)
        self._started = context.reading()
        self._tip_since = "", 0.0
        """Hash of the newest block, and the steady clock when the server first saw it."""
        self._frozen_by: Kind | None = None
        self.alarms: tuple[Alarm, ...] = ()
        context.chain_view.is_whole = False
        registry.before_waking.append(self._scan_before_waking)

    async def wait(self, seconds: float) -> None:
        """Wait for a new block or a change, at most `seconds`; during a round, for the duration of its last page."""
        tip = self._context.chain_view.tip
        if self._round_at and not self._context.chain_view.problem:
            await asyncio.sleep(min(seconds, self._page_seconds, 1.0))
            return
        try:
            if tip is not None and not self._context.chain_view.problem:
                await self._context.chain.wait_for_change(tip, seconds)
                return
        except ChainFailed:
            pass
        await asyncio.sleep(min(seconds, 1.0))

    async def scan(self) -> bool:
        """Update the chain view, and return whether that ended a round; stop payments if the chain does not answer."""
        seen, before = self._context.chain_view, self._all_seen_at
        try:
            seen.tip = await self._context.chain.tip()
            self._follow_again_if_forgotten(seen.tip)
            self._note_time(seen.tip)
            freezes = self._clock_problem(seen.tip) or self._tip_problem(seen.tip)
            await self._scan_funding(seen.tip)
            seen.fees = await self._context.chain.fees()
        except ChainFailed as error:
            freezes = Alarm(Kind.CHAIN, f"the chain does not answer: {error}")
        self._freeze(freezes)
        return self._all_seen_at != before

    def _freeze(self, alarm: Alarm | None) -> None:
        """Stop payments for this reason, or accept them again; log a change once."""
        seen, kind = self._context.chain_view, alarm.kind if alarm else None
        if kind is not self._frozen_by:
            self._context.observers.report_health("chain", alarm.text if alarm else "")
        seen.problem, self._frozen_by = alarm.text if alarm else "", kind
        lacks = (Alarm(Kind.NODE, text) for text in self._context.chain.capabilities.shortcomings)
        alarms = (alarm, *lacks, self._ahead(seen.tip) if kind is not Kind.CLOCK else None, self._behind(seen.tip))
        self.alarms = tuple(filter(None, alarms))

    def _note_time(self, tip: Tip) -> None:
        reading = self._context.reading()
        if not leads(reading.wall, tip.time):
            self._context.chain_view.agreed = reading
        if tip.block_hash != self._tip_since[0]:
            self._tip_since = tip.block_hash, reading.steady

    def _clock_problem(self, tip: Tip) -> Alarm | None:
        """Freeze if no witness agrees with the clock.

        If blocks may be of any age (`stale_seconds` is 0), an old block proves nothing: then only a step of the clock
        since the start freezes.
        """
        alarm = self._ahead(tip)
        return alarm if self._stale_seconds or stepped(self._context.reading(), self._started) else None

    def _ahead(self, tip: Tip | None) -> Alarm | None:
        context = self._context
        reading = context.reading()
        if tip is None or is_believed(reading, tip.time, context.chain_view.agreed):
            return None
        lead = f"{_times(reading.wall, tip)}, {(reading.wall - tip.time) // 60} minutes earlier"
        return Alarm(Kind.CLOCK, f"{lead}: the clock or the node is wrong, and no channel is closed by this clock")

    def _behind(self, tip: Tip | None) -> Alarm | None:
        wall = self._context.clock()
        if tip is None or tip.time - wall <= LEAD_SECONDS:
            return None
        return Alarm(Kind.CLOCK, f"{_times(wall, tip)}: the clock is behind, and median time past counts")

    def _tip_problem(self, tip: Tip) -> Alarm | None:
        """Freeze if the newest block is too old by the wall clock, or by the steady clock if that one is behind."""
        reading = self._context.reading()
        age = max(reading.wall - tip.time, int(reading.steady - self._tip_since[1]))
        if not self._stale_seconds or age <= self._stale_seconds:
            return None
        text = f"the newest block is {age // 60} minutes old, limit {self._stale_seconds // 60}"
        return Alarm(Kind.CHAIN, text)

    async def _scan_funding(self, tip: Tip) -> None:
        """Compare open channels with the chain.

        After a new block this scans all of them, one page per call; otherwise only those whose output can change
        without a block.
        """
        if not self._round_at and tip.block_hash != self._all_seen_at:
            if self._round_tip is None or not await self._context.chain.holds(self._round_tip):
                self._context.chain_view.is_whole = False  # a reorg may have removed confirmations
            self._round_at, self._round_tip = tip.block_hash, tip
        if self._round_at:
            await self._scan_next_page()
        now = asyncio.get_running_loop().time()
        if not self._round_at or now - self._unverified_scanned_at >= _UNVERIFIED_SECONDS:
            await self._scan_unverified()
            self._unverified_scanned_at = now

    async def _scan_next_page(self) -> None:
        """Scan the next page of the round.

        A block that comes meanwhile starts no new round before this one ends: otherwise channels that expire last would
        never be scanned while blocks come quickly.
        """
        begun = asyncio.get_running_loop().time()
        if self._round_after is None:
            await self._scan_unfinished(follow=not self._follows_unfinished)
        page = await self._context.store.scan(State.OPEN, after=self._round_after, limit=_PAGE)
        if not self._follows_open:
            await self._follow(page)
        await self._judge_all(page)
        self._note_withdrawable(page)
        self._round_after = _place(page[-1]) if len(page) == _PAGE else None
        self._page_seconds = asyncio.get_running_loop().time() - begun
        if self._round_after is None:
            self._all_seen_at, self._round_at = self._round_at, ""
            self._follows_open = True
            self._context.chain_view.is_whole = True
            if self._scan_before_waking in self._registry.before_waking:
                self._registry.before_waking.remove(self._scan_before_waking)

    def _follow_again_if_forgotten(self, tip: Tip) -> None:
        """Begin a round that watches all channels again if the chain backend has lost its memory: a new wallet."""
        memory = self._context.chain.capabilities.memory
        if self._memory not in (None, memory):
            log.error("the node has lost its list of watched scripts, the server sends it again")
            self._follows_unfinished, self._follows_open = False, False
            self._round_at, self._round_after = tip.block_hash, None
            self.endings.scan_all_again()
        self._memory = memory

    async def _scan_unfinished(self, *, follow: bool) -> None:
        """Scan, once in a round, the funding of channels that settle, and of those that are UNFUNDED."""
        for state in _SETTLING:
            async for channels in _pages(walk(self._context.store, state)):
                if follow:
                    await self._follow(channels)
                await self._scan_settling(channels)
        self._follows_unfinished = True
        await self.endings.scan_unfunded(spent=True)

    def _note_withdrawable(self, page: Sequence[Channel]) -> None:
        above = self._context.withdraw_above_sat
        if above:
            self._withdrawable += [
                channel for channel in page if channel.received_sat >= above and can_withdraw(channel)
            ]

    def take_withdrawable(self) -> list[Channel]:
        """Return the channels that the round found worth withdrawing from, and forget them."""
        earned, self._withdrawable = self._withdrawable, []
        return earned

    async def _scan_before_waking(self, channel: Channel) -> None:
        """Scan a channel before it wakes during the first round; concurrent callers share one scan."""
        if channel.state is State.OPEN:
            if self._round_after is not None and _order(*_place(channel)) <= _order(*self._round_after):
                return
        elif self._follows_unfinished or channel.state not in _SETTLING:
            return
        outpoint = channel.outpoint
        scanning = self._first_scans.get(outpoint)
        if scanning is None:
            scanning = self._first_scans[outpoint] = asyncio.create_task(self._first_scan(channel))
            scanning.add_done_callback(lambda _: self._first_scans.pop(outpoint))
        await asyncio.shield(scanning)

    async def _first_scan(self, channel: Channel) -> None:
        """Freeze the channel unless its funding is certainly unspent; later scans find out what happened to it."""
        reason = _UNSEEN
        try:
            async with asyncio.timeout(_WAKING_SECONDS):
                await self._follow([channel])
                funding = (await self._context.chain.unspent([channel.outpoint])).get(channel.outpoint)
                reason = self._depth_problem(channel, funding) if funding is not None else "its funding output is gone"
        except Exception as error:  # noqa: BLE001 - closing needs the actor, whatever the chain does
            log.warning("can't check funding", channel=str(channel.outpoint), reason=str(error) or "no answer")
        if channel.state is State.OPEN:
            self._mark(channel, reason)

    async def _scan_unverified(self) -> None:
        seen = self._context.chain_view
        exposure = self._context.exposure
        unverified = {*seen.in_danger, *exposure.open}
        records = [await self._registry.read_readable(outpoint) for outpoint in unverified]
        await self._judge_all([record for record in records if record is not None and record.state is State.OPEN])
        await self._scan_settling([record for record in records if record is not None and record.state in _SETTLING])
        for outpoint, record in zip(unverified, records, strict=True):
            if record is None or record.state is not State.OPEN:
                seen.in_danger.pop(outpoint, None)  # also a channel that this scan has just ended
            if record is None or record.state not in (State.OPEN, *_SETTLING):
                exposure.note_safe(outpoint)
        await self.endings.scan_unfunded(spent=False)

    async def _scan_settling(self, channels: Sequence[Channel]) -> None:
        """Count the funding of channels that are being settled in the exposure while no block contains it.

        Funding that is gone, because another transaction spends its inputs, no longer counts: it is lost, or comes
        back.
        """
        if not channels:
            return
        unspent = await self._context.chain.unspent([channel.outpoint for channel in channels])
        for channel in channels:
            funding = unspent.get(channel.outpoint)
            if funding is not None:
                self.endings.note_present(channel.outpoint)
                self._count_exposure(channel, funding)
                continue
            try:
                spend = await self.endings.spender_of(channel)
            except ChainFailed as error:  # continue with the other channels
                log.warning("spend of a funding output unknown", channel=str(channel.outpoint), reason=str(error))
                continue
            if spend is None or spend.confirmations:
                self._context.exposure.note_safe(channel.outpoint)
            elif not self._context.rules.confirmations_needed(channel.funding_sat):  # its funding may be unconfirmed
                self._context.exposure.note_open(channel.outpoint, channel.funding_sat)

    async def _judge_all(self, channels: Sequence[Channel]) -> None:
        if channels:
            unspent = await self._context.chain.unspent([channel.outpoint for channel in channels])
            for channel in channels:
                await self._judge(channel, unspent.get(channel.outpoint))

    async def _follow(self, page: Sequence[Channel]) -> None:
        """Watch channels again after a start; a backend that lost them too scans from before the first opening on."""
        if page:
            since = min(channel.opened_at for channel in page) - _FUNDED_BEFORE_SECONDS
            await self._context.chain.watch([channel.terms for channel in page], UnixTime(max(0, since)))

    async def _judge(self, channel: Channel, funding: Funding | None) -> None:
        """Freeze a channel whose funding is gone, thaw one whose funding is back, end one whose funding was spent."""
        if funding is None:
            self._context.exposure.note_safe(channel.outpoint)
            try:
                reason = await self.endings.judge_missing(channel)
            except ChainFailed as error:  # continue with the other channels
                reason = f"its funding output is gone, and its spend is not known yet: {error}"
            self._mark(channel, reason)
        else:
            self.endings.note_present(channel.outpoint)
            self._mark(channel, self._depth_problem(channel, funding))

    def _depth_problem(self, channel: Channel, funding: Funding) -> str:
        """Say why an unspent funding output does not suffice, or ""; note whether a block contains it."""
        self._count_exposure(channel, funding)
        need = self._context.confirmations_needed(channel)
        if funding.usable_confirmations >= need:
            return ""
        return f"its funding output has {funding.usable_confirmations} confirmations, need {need}"

    def _count_exposure(self, channel: Channel, funding: Funding) -> None:
        """Count unconfirmed funding. An immature coinbase output can't be settled yet, and counts too."""
        if funding.usable_confirmations:
            self._context.exposure.note_safe(channel.outpoint)
        else:
            self._context.exposure.note_open(channel.outpoint, channel.funding_sat)

    def _mark(self, channel: Channel, reason: str) -> None:
        """Freeze or thaw a channel, and log a change."""
        danger = self._context.chain_view.in_danger
        if reason == danger.get(channel.outpoint, ""):
            return
        log.warning("channel frozen" if reason else "channel thawed", channel=str(channel.outpoint), reason=reason)
        if reason:
            danger[channel.outpoint] = reason
        else:
            danger.pop(channel.outpoint)


def _times(wall: UnixTime, tip: Tip) -> str:
    return f"the server's clock says {clock(wall)}, the newest block {clock(tip.time)}"


def _place(channel: Channel) -> tuple[int, OutPoint]:
    """Position of a channel among those of its state."""
    return channel.terms.expiry.lock_time, channel.outpoint


def _order(expiry: int, outpoint: OutPoint) -> tuple[int, bytes]:
    """Sort key of the store."""
    return expiry, outpoint.serialize()


async def _pages(channels: AsyncIterator[Channel]) -> AsyncIterator[list[Channel]]:
    """Gather channels, so that one request to the chain covers many."""
    page: list[Channel] = []
    async for channel in channels:
        page.append(channel)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page
