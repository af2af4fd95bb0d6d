"""The watcher: starts closing before expiry, and resumes every unfinished settlement.

The watcher is supervised: a failed scan is logged, and the next scan comes; `last_scan` shows an operator that it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import structlog

from actors.alarm import Alarm, Kind, about
from actors.channel import Message, Resume
from actors.context import Context
from actors.registry import Registry
from actors.settling.planner import SettlementPlanner
from actors.watching.behind import Behind
from actors.watching.endings import REMEMBERED_SECONDS
from actors.watching.funding import ChainWatch
from paychan.protocol.channel import Channel, Close, CloseReason, Rejected, Rules, State
from paychan.protocol.ending import end_of
from paychan.protocol.errors import NotEconomical
from paychan.protocol.fees import Shortfall, least_fee
from paychan.protocol.types import OutPoint, UnixTime
from paychan.store.base import walk
from paychan.supervisor import Supervised

log = structlog.get_logger("watcher")

_AT_ONCE = 32
"""Most channels settled concurrently; signer and node handle their requests in turn anyway."""


class Watcher:
    """Scans expiries and unfinished settlements, at start and then at intervals."""

    def __init__(
        self,
        context: Context,
        registry: Registry,
        planner: SettlementPlanner,
        *,
        interval_seconds: float,
        alarm_seconds: int,
        idle_seconds: int,
        stale_seconds: int = 0,
    ) -> None:
        self._context = context
        self._registry = registry
        self._planner = planner
        self._chain = ChainWatch(context, registry, stale_seconds)
        self._behind = Behind(context, registry)
        self._interval_seconds = interval_seconds
        self._alarm_seconds = alarm_seconds
        self._idle_seconds = idle_seconds
        self.last_scan: UnixTime | None = None
        self.alarms: tuple[Alarm, ...] = ()
        """Alarms of the last scan."""

    async def run(self, task: Supervised) -> None:
        """Scan at intervals; ends only by cancellation, or by a failure, after which the supervisor starts it again."""
        while True:
            if await self.scan():
                task.succeeded()
            await self._wait()

    async def _wait(self) -> None:
        """Wait for the interval, or for a new block until all channels were scanned; other news concern few of them."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._interval_seconds
        while (left := end - loop.time()) > 0:
            await self._chain.wait(left)
            if await self._chain.scan():
                return

    async def scan(self) -> bool:
        """Scan everything once and return whether that succeeded; a failure is logged and becomes an alarm."""
        try:
            await self._scan()
        except Exception as error:
            self.alarms = (Alarm(Kind.WATCHER, f"watcher failed: {error}"),)
            log.exception("watcher failed, scans again", seconds=self._interval_seconds)
            return False
        return True

    async def _scan(self) -> None:
        """Close the channels that are due, resume unfinished settlements, raise alarms about late ones."""
        await self._chain.scan()
        await self._behind.scan()
        now = self._context.acting_time()
        due = now + self._context.rules.settlement_period_seconds
        await self._tell(walk(self._context.store, State.OPEN, due + 1), Close(CloseReason.EXPIRY))
        for state in (State.CLOSING, State.PUBLISHED):
            await self._tell(walk(self._context.store, state), Resume())
        await self._planner.follow_reserve()
        await self._tell(_each(self._chain.take_withdrawable()), Close(CloseReason.WITHDRAW))
        await self._chain.endings.scan_ended()
        await self._find_late(now or self._context.now())
        self._registry.passivate(self._idle_seconds)
        self.last_scan = self._context.clock()

    async def _tell(self, channels: AsyncIterator[Channel], message: Message) -> None:
        """Send each channel a message; a channel that can't be settled does not delay the others."""
        room = asyncio.Semaphore(_AT_ONCE)

        async def tell(channel: Channel) -> None:
            async with room:
                try:
                    outcome = await self._registry.ask(channel.outpoint, message)
                except Exception:
                    log.exception("channel failed", channel=str(channel.outpoint))
                    return
            if isinstance(outcome, Rejected) and not isinstance(outcome.error, NotEconomical):
                log.warning("channel waits", channel=str(channel.outpoint), reason=str(outcome.error))

        async with asyncio.TaskGroup() as group:
            async for channel in channels:
                group.create_task(tell(channel))

    async def _find_late(self, now: UnixTime) -> None:
        late: list[OutPoint] = []
        for state in (State.OPEN, State.CLOSING, State.PUBLISHED):
            near = walk(self._context.store, state, now + self._alarm_seconds)
            late += [channel.outpoint async for channel in near if _is_worth_it(channel, self._context.rules)]
        if late:
            log.error("unsettled near expiry", channels=[str(outpoint) for outpoint in late[:10]], count=len(late))
        self.alarms = (
            *self._chain.alarms,
            *self._beyond_cap(),
            *(about(Kind.LATE, outpoint, "unsettled near expiry") for outpoint in late),
            *(about(Kind.PINNED, outpoint, reason) for outpoint, reason in self._planner.pinned.items()),
            *(about(Kind.FEE, outpoint, reason) for outpoint, reason in self._planner.beyond_share.items()),
            *await self._lost(now),
        )

    def _beyond_cap(self) -> list[Alarm]:
        """Alarm if the relay minimum exceeds the operator's cap: no settlement would confirm before the refunds do."""
        floor, cap = self._context.chain_view.fees.floor_sat_per_vb, self._context.rules.max_fee_sat_per_vb
        if floor <= cap:
            return []
        text = f"nothing is relayed below {floor} sat/vB, settlements pay {cap} sat/vB at most"
        return [Alarm(Kind.FEE, f"{text}: raise max_fee_sat_per_vb of server and signer before channels expire")]

    async def _lost(self, now: UnixTime) -> list[Alarm]:
        """Alarms about the channels that another party's transaction ended, for a month after their expiry."""
        since = UnixTime(max(0, now - REMEMBERED_SECONDS)), OutPoint(bytes(32), 0)
        lost = await self._context.store.scan(State.LOST, after=since)
        rules = self._context.rules
        return [
            about(Kind.LOST, channel.outpoint, str(end_of(channel))) for channel in lost if _is_worth_it(channel, rules)
        ]


def _is_worth_it(channel: Channel, rules: Rules) -> bool:
    """Say whether a channel received more than its cheapest settlement costs; otherwise an alarm would be useless."""
    return channel.received_sat > 0 and not isinstance(least_fee(channel, rules), Shortfall)


async def _each(channels: Iterable[Channel]) -> AsyncIterator[Channel]:
    for channel in channels:
        yield channel
