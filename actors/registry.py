"""Map from outpoint to actor: wakes the actor of a channel when a message comes for it, and stops idle actors.

It has its own map, because pykka's registry finds an actor by scanning a list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from actors.channel import ChannelActor, Message, Payments, Resume
from actors.context import Context
from actors.observing import PaymentRefused
from actors.settling.planner import SettlementPlanner
from paychan.protocol.channel import (
    Accepted,
    Channel,
    Outcome,
    Pay,
    Rejected,
    State,
)
from paychan.protocol.charges import Charge
from paychan.protocol.errors import ChannelExists, DamagedRecord, OutpointUsed, PaychanError, UnknownChannel
from paychan.protocol.types import OutPoint
from paychan.store.base import Change
from paychan.tracing import NUMBERS, REQUEST

_POLL_SECONDS = 0.005

_NOT_WAKING = (Pay, Charge)
"""A sleeping channel is not woken for these while memory is short; it is always woken to close."""


class Registry:
    """All channels of this process, asleep or awake. Every API reaches a channel through it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.actors: dict[OutPoint, ChannelActor] = {}
        """The channels that are awake; an actor in it may have stopped."""
        self._reading: dict[OutPoint, asyncio.Task[Channel | None]] = {}
        self.unanswered = 0
        """Number of messages without an answer; a caller that tells an actor a message counts it here itself."""
        self.planner: SettlementPlanner | None = None
        """Settles the channels that wake, in a process of the settling role, see `actors.roles`."""
        self.before_waking: list[Callable[[Channel], Awaitable[None]]] = []
        """Callbacks awaited with the record of a channel before it wakes, until the first scans since the start end."""

    @property
    def awake(self) -> int:
        """Number of actors."""
        return len(self.actors)

    async def read(self, outpoint: OutPoint) -> Channel | None:
        """Return a channel's record without waking it; it may be newer than the disk."""
        actor = self.actors.get(outpoint)
        if actor is not None and actor.alive:
            return actor.channel
        return await self._context.store.get(outpoint)

    async def read_readable(self, outpoint: OutPoint) -> Channel | None:
        """Read a channel as `read` does, for work on many channels: None also if its record is damaged."""
        with suppress(DamagedRecord):
            return await self.read(outpoint)
        return None

    async def equalise_lookup_cost(self, found: OutPoint, *others: OutPoint) -> None:
        """Do for a known channel the store reads that an unknown one costs, so that time reveals no channel.

        An unknown channel is looked up in the store under each of its names. Both answers are sent at a fixed moment,
        but a difference in the work before it would show by some microseconds.
        """
        actor = self.actors.get(found)
        if actor is not None and actor.alive:
            await self._context.store.get(found)
        for other in others:
            await self._context.store.get(other)

    async def ask(self, outpoint: OutPoint, message: Message) -> Outcome:
        """Send a channel a message; return its outcome once that is durable."""
        self.unanswered += 1
        try:
            actor = self.find_awake(outpoint)
            if actor is None:
                problem = self._context.memory_problem() if isinstance(message, _NOT_WAKING) else None
                if problem is not None:
                    return Rejected(problem)
                actor = await self._awakened(outpoint)
            if actor is None:
                return Rejected(UnknownChannel())
            if isinstance(message, Pay):
                paid = await _pay(actor, message)
                self.report_refusals(outpoint, (paid,))
                return paid
            outcome: Outcome = await actor.ask(message)
            return outcome
        finally:
            self.unanswered -= 1

    def report_refusals(self, outpoint: OutPoint, outcomes: Sequence[Outcome]) -> None:
        """Report the refused ones of a channel's payments, if an observer wants that."""
        if not self._context.observers.wants_refusals:
            return
        request = REQUEST.set(REQUEST.get() or next(NUMBERS))
        for outcome in outcomes:
            if isinstance(outcome, Rejected):
                self._context.observers.report(PaymentRefused(outpoint, outcome.error.code))
        REQUEST.reset(request)

    def find_awake(self, outpoint: OutPoint) -> ChannelActor | None:
        """Return a channel's actor if it is awake."""
        actor = self.actors.get(outpoint)
        return actor if actor is not None and actor.alive else None

    async def awaken(self, outpoint: OutPoint) -> ChannelActor | None:
        """Return a channel's actor, and wake it if it sleeps; None if there is no such channel."""
        with self._answering():
            return await self._awakened(outpoint)

    async def create(self, opened: Accepted) -> Outcome:
        """Store a new channel and continue with its first step; an outpoint can be used only once.

        A stored channel is answered as opened, even if it starts with a settlement that has to wait.
        """
        channel = opened.channel
        with self._answering():
            written = await self._context.commits.put(Change(None, channel), opened, _nothing)
            if isinstance(written, Rejected):
                return Rejected(await self.in_the_way(channel.outpoint) or written.error)
            if channel.state is State.OPEN:
                self._wake(channel)
                return written
            settled = await self.ask(channel.outpoint, Resume())
            return Accepted(settled.channel, opened.value_sat) if isinstance(settled, Accepted) else written

    async def in_the_way(self, outpoint: OutPoint) -> PaychanError | None:
        """Return the refusal to open an outpoint if a channel has used it, else None."""
        channel = await self.read(outpoint)
        if channel is None:
            return None
        under_way = channel.state in (State.OPEN, State.CLOSING)
        return (ChannelExists if under_way else OutpointUsed)(outpoint=str(outpoint))

    def passivate(self, idle_seconds: int) -> int:
        """Stop the actors that had no message for this time; return their number."""
        limit = self._context.clock() - idle_seconds
        idle = [outpoint for outpoint, actor in self.actors.items() if actor.idle_since(limit)]
        for outpoint in idle:
            self.actors.pop(outpoint).stop()
        return len(idle)

    async def all_answered(self, patience_seconds: float) -> None:
        """Wait until every sent message is answered, at most `patience_seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                while self.unanswered:  # noqa: ASYNC110 - an event would cost time in every payment
                    await asyncio.sleep(_POLL_SECONDS)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        self.unanswered += 1
        try:
            yield
        finally:
            self.unanswered -= 1

    async def _awakened(self, outpoint: OutPoint) -> ChannelActor | None:
        """Return the channel's actor. If it sleeps, concurrent callers share one read of its record, in their order."""
        actor = self.find_awake(outpoint)
        if actor is not None:
            return actor
        reading = self._reading.get(outpoint)
        if reading is None:
            reading = self._reading[outpoint] = asyncio.create_task(self._read_to_wake(outpoint))
            reading.add_done_callback(lambda _: self._reading.pop(outpoint, None))
        channel = await asyncio.shield(reading)
        return None if channel is None else self._wake(channel)

    async def _read_to_wake(self, outpoint: OutPoint) -> Channel | None:
        channel = await self._context.store.get(outpoint)
        if channel is not None and self.before_waking:
            await asyncio.gather(*(before(channel) for before in self.before_waking))
        return channel

    def _wake(self, channel: Channel) -> ChannelActor:
        """Start the actor, unless another message has started it while the record was being read."""
        actor = self.actors.get(channel.outpoint)
        if actor is None or not actor.alive:
            actor = self.actors[channel.outpoint] = ChannelActor.launch(channel, self._context, self.planner)
        return actor


async def _pay(actor: ChannelActor, payment: Pay) -> Outcome:
    outcomes: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def take(done: Payments) -> None:
        if not outcomes.done():
            outcomes.set_result(done.outcomes[0])

    actor.tell(Payments([payment], take))
    return await outcomes


def _nothing() -> None:
    """Ignore a conflict: the second of two creations has no actor that could hold an outdated version."""
