"""Outpoint to actor: wakes the actor of an open channel when a message comes for it, lets idle ones sleep.

Keeps its own map, because pykka's registry finds an actor by scanning a list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from actors.channel import ChannelActor, Message, PayBatch, Resume
from actors.context import Context
from actors.settling.planner import SettlementPlanner
from paychan.protocol.channel import Accepted, Channel, Outcome, Pay, Rejected, State
from paychan.protocol.errors import ChannelExists, OutpointUsed, PaychanError, UnknownChannel
from paychan.protocol.types import OutPoint
from paychan.store.base import Change

_POLL_SECONDS = 0.005


class Registry:
    """All channels of this process, asleep or awake. Every door asks here."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._awake: dict[OutPoint, ChannelActor] = {}
        self._reading: dict[OutPoint, asyncio.Task[Channel | None]] = {}
        self._unanswered = 0
        self.planner = SettlementPlanner(context, self.read)
        self.before_waking: list[Callable[[Channel], Awaitable[None]]] = []
        """Awaited with the record of each channel that is to be woken, while the first looks since the start want that."""

    @property
    def awake(self) -> int:
        """Number of actors."""
        return len(self._awake)

    async def read(self, outpoint: OutPoint) -> Channel | None:
        """Return a channel's record without waking it; it may be newer than the disk."""
        actor = self._awake.get(outpoint)
        if actor is not None and actor.alive:
            return actor.channel
        return await self._context.store.get(outpoint)

    async def equalise_lookup_cost(self, found: OutPoint, *others: OutPoint) -> None:
        """Do, for a channel that was found, what is still missing to the work that an unknown one makes.

        That one is looked for in the store, under each of its names. Both are answered at a fixed moment, but what the
        machine did before shows in some microseconds.
        """
        actor = self._awake.get(found)
        if actor is not None and actor.alive:
            await self._context.store.get(found)
        for other in others:
            await self._context.store.get(other)

    async def ask(self, outpoint: OutPoint, message: Message) -> Outcome:
        """Give a channel a message; the answer comes when what it says is durable."""
        with self._answering():
            if isinstance(message, Pay) and (problem := self._no_room_to_wake(outpoint)) is not None:
                return Rejected(problem)
            actor = await self._awakened(outpoint)
            if actor is None:
                return Rejected(UnknownChannel())
            outcome: Outcome = await actor.ask(message)
            return outcome

    def reach(self, outpoint: OutPoint) -> ChannelActor | None:
        """Return a channel's actor if it is awake."""
        actor = self._awake.get(outpoint)
        return actor if actor is not None and actor.alive else None

    def give(self, actor: ChannelActor, message: Message | PayBatch, then: Callable[[Any], object]) -> None:
        """Give an actor that is awake a message, as `ask` does without a coroutine.

        `then` is called with something whose `result()` is the outcome, once what it says is durable.
        """
        self._unanswered += 1

        def answered(answer: Any) -> None:
            self._unanswered -= 1
            then(answer)

        actor.ask(message, answered)

    async def awaken(self, outpoint: OutPoint) -> ChannelActor | None:
        """Return a channel's actor, which is woken if it sleeps; None: there is no such channel."""
        with self._answering():
            return await self._awakened(outpoint)

    async def create(self, opened: Accepted) -> Outcome:
        """Store a new channel, and carry on with it; an outpoint is used once for ever.

        A channel that was stored is answered as opened, also when the settlement it begins with has to wait.
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
        """Return why an outpoint can't be opened, if a channel used it."""
        channel = await self.read(outpoint)
        if channel is None:
            return None
        under_way = channel.state in (State.OPEN, State.CLOSING)
        return (ChannelExists if under_way else OutpointUsed)(outpoint=str(outpoint))

    def passivate(self, idle_seconds: int) -> int:
        """Stop the actors that had no message for so long; return how many."""
        limit = self._context.clock() - idle_seconds
        idle = [outpoint for outpoint, actor in self._awake.items() if actor.idle_since(limit)]
        for outpoint in idle:
            self._awake.pop(outpoint).stop()
        return len(idle)

    async def all_answered(self, patience_seconds: float) -> None:
        """Wait until every message that was given is answered, but not for ever."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                while self._unanswered:  # noqa: ASYNC110 - an event would cost every payment something
                    await asyncio.sleep(_POLL_SECONDS)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        self._unanswered += 1
        try:
            yield
        finally:
            self._unanswered -= 1

    def _no_room_to_wake(self, outpoint: OutPoint) -> PaychanError | None:
        """Return why a channel that sleeps is not woken for a payment; to close it there is always room."""
        return None if self.reach(outpoint) is not None else self._context.memory_problem()

    async def _awakened(self, outpoint: OutPoint) -> ChannelActor | None:
        """Return the channel's actor. If it sleeps, its record is read once for all who ask meanwhile, in their order."""
        actor = self.reach(outpoint)
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
        """Start the actor, unless another message did while the record was being read."""
        actor = self._awake.get(channel.outpoint)
        if actor is None or not actor.alive:
            actor = self._awake[channel.outpoint] = ChannelActor.launch(channel, self._context, self.planner)
        return actor


def _nothing() -> None:
    """A creation that came second has no actor that could hold an outdated version."""
