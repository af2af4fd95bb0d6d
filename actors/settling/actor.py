"""The part of a channel's actor that carries out its settlement: one step of the record after the other."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, TypeGuard

import structlog

from actors.context import Context
from actors.runtime import LoopActor
from actors.settling.planner import SettlementPlanner
from actors.settling.steps import perform
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import (
    Accepted,
    Adopt,
    Channel,
    Command,
    Found,
    Outcome,
    Published,
    Rejected,
    State,
    Step,
    TakenBack,
    Unanswered,
    Vanished,
    next_step,
)
from paychan.protocol.errors import PaychanError
from paychan.protocol.opening import successor
from paychan.protocol.state_machine import apply
from paychan.protocol.types import OutPoint
from paychan.store.base import Change
from paychan.tracing import enter_channel

log = structlog.get_logger("channel")

FROM_OUTSIDE = (Found, Adopt)
"""Commands that report a settlement of the chain or the signer."""

_NEW_OUTPUT = "its funding output is new, and the server is checking it"


class SettlingActor(LoopActor):
    """A channel's record, and the steps of its settlement; `channel.ChannelActor` adds the messages."""

    def __init__(self, channel: Channel, context: Context, planner: SettlementPlanner | None) -> None:
        super().__init__()
        self.channel = channel
        """The newest accepted version; it may not be on disk yet."""
        self._context = context
        self._planner = planner
        self._group = 0
        """Number of the commit group that holds the newest change."""
        self._settling: asyncio.Future[PaychanError | None] | None = None
        self._takes_over = channel.state is not State.OPEN
        """Whether the settlement began before this actor woke, or came from outside: from the chain or the signer."""

    @property
    def name(self) -> str:
        return f"channel {self.channel.outpoint}"

    def _question(self) -> asyncio.Future[Outcome]:
        """Ask the application about the offered payment."""
        raise NotImplementedError

    def _put(self, channel: Channel, outcome: Accepted) -> asyncio.Future[Outcome]:
        """Persist the next version of the channel, and use it from now on."""
        commits = self._context.commits
        durable = commits.put(Change(self.channel, channel), outcome, self.stop)
        self.channel, self._group = channel, commits.gathering
        return durable

    async def _settle(self) -> PaychanError | None:
        """Carry the settlement as far as possible now; callers that wait at the same time share one run."""
        if not under_way(self._settling):
            self._settling = asyncio.create_task(self._settle_steps())
        return await asyncio.shield(self._settling)

    async def _settle_steps(self) -> PaychanError | None:
        enter_channel(self.channel.outpoint)  # in this task's log lines
        published = False
        while (step := next_step(self.channel)) is not None:
            if step is Step.OFFER:
                if self.channel.state is State.OPEN or not await self._offer_decided():
                    return None  # the watcher resumes later
                continue
            try:
                command = await perform(step, self.channel, self._context, self._planner)
            except PaychanError as error:
                self._context.unsigned.note(self.channel.outpoint, error)
                log.warning("settlement waits", channel=str(self.channel.outpoint), step=step.name, reason=str(error))
                return error
            if command is None or (published and isinstance(command, Vanished)):
                return None  # the network shows no spend yet; the watcher resumes later
            published = published or isinstance(command, Published)
            before = self.channel
            outcome = await self._record(command)
            if isinstance(outcome, Rejected):
                return outcome.error
            if self.channel.closing and self.channel.closing.settlement:
                self._context.unsigned.note(self.channel.outpoint, None)
            if isinstance(command, TakenBack):
                return command.error
            if self.channel is before:
                return None  # the command changed nothing; a later scan may find more
        return None

    async def _offer_decided(self) -> bool:
        """Ask once more about the offered payment of a closing channel; return whether it is decided now."""
        await asyncio.wait([self._question()])
        if self.channel.offered is not None:
            await self._record(Unanswered())
        return self.channel.offered is None

    async def _record(self, command: Command) -> Outcome:
        """Make a step of the settlement durable before the next one begins."""
        outcome = apply(self.channel, command, self._context.view(self.channel.outpoint))
        if isinstance(outcome, Rejected) or outcome.channel is self.channel:
            return outcome
        durable = self._put(outcome.channel, outcome)
        self._takes_over |= isinstance(command, FROM_OUTSIDE)
        if self.channel.moves and self.channel.state is State.CLOSED:  # both records are in the same write
            next_one = successor(self.channel, self._context.now())
            self._hold_payments(next_one.outpoint)
            self._context.commits.put(Change(None, next_one), Accepted(next_one), _nothing)
            await asyncio.shield(durable)
            await self._release_payments(next_one.outpoint)
        return await asyncio.shield(durable)

    def _hold_payments(self, outpoint: OutPoint) -> None:
        """Refuse payments on the continued channel until its funding output was checked.

        If an earlier run of this server began the withdrawal, the channel may have received more since: then the signer
        is asked as well.
        """
        self._context.chain_view.in_danger.setdefault(outpoint, _NEW_OUTPUT)
        if self._takes_over:
            self._context.chain_view.unasked[outpoint] = _NEW_OUTPUT

    async def _release_payments(self, outpoint: OutPoint) -> None:
        """Let the continued channel accept payments if its output is unspent; it may have moved on long ago."""
        with suppress(ChainFailed):
            if await self._context.chain.unspent([outpoint]):
                self._context.chain_view.in_danger.pop(outpoint, None)


def _nothing() -> None:
    """Ignore a conflict: a channel that moves again after a reorg has its successor's record already."""


def under_way(work: asyncio.Future[Any] | None) -> TypeGuard[asyncio.Future[Any]]:
    """Say whether this work has begun and has not ended."""
    return work is not None and not work.done()
