"""The actor of one open channel: it handles all commands for the channel in sequence.

The rules are in `protocol.state_machine`. The actor only applies them, persists the new record, uses it, performs the
next step that the record needs, and answers. Persist, use and answer are adjacent lines in `_judge`. Several payments
may be between these lines at a time: each is judged against the newest accepted record, and none is answered before its
record is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias, TypeGuard

import structlog
from msgspec import Struct

from actors.context import Context
from actors.runtime import LoopActor
from actors.settling.planner import SettlementPlanner
from actors.settling.steps import perform
from paychan.callback.base import ApplicationSilent, Verdict
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import (
    Accepted,
    Adopt,
    Answer,
    Channel,
    Close,
    CloseByPayment,
    CloseByProof,
    Command,
    Found,
    Outcome,
    Pay,
    Published,
    Rejected,
    State,
    Step,
    TakenBack,
    Unanswered,
    Vanished,
    next_step,
)
from paychan.protocol.errors import ApplicationRefused, Overloaded, PaychanError, PaymentPending, TryAgain
from paychan.protocol.forgery import forged
from paychan.protocol.opening import successor
from paychan.protocol.payment import Payment, change_problem
from paychan.protocol.payment_batch import Commands, judge, newest_of
from paychan.protocol.state_machine import apply
from paychan.protocol.types import OutPoint
from paychan.store.base import Change
from paychan.tracing import enter_channel

log = structlog.get_logger("channel")

_NEW_OUTPUT = "its funding output is new, and the server is checking it"
_FROM_OUTSIDE = (Found, Adopt)

MOST_BEHIND = 64
"""Most payments of a channel that may wait for the application's answer to an earlier one."""


class Resume(Struct, frozen=True):
    """Continue an unfinished settlement."""


class PayBatch(Struct):
    """Payments that came together; the answer has an outcome for each judged payment, in their order.

    With `in_parts` the actor judges only as many as one turn of the loop has time for, and none after a bad signature,
    which the caller delays before it sends the rest. `judged` and `outcomes` are set as soon as the message is in the
    inbox; they tell the caller how far the actor came.
    """

    commands: Commands
    in_parts: bool = False
    judged: int = 0
    """Number of judged payments, from the first on."""
    outcomes: Sequence[Outcome] = ()
    """Their outcomes before the record is on disk: the caller must not answer with them."""
    waits: bool = False
    """Whether only the final answer has the outcomes, because the application is asked about each payment."""


Message: TypeAlias = Command | Resume


class ChannelActor(LoopActor):
    """Owns the newest version of one channel's record while it is awake."""

    def __init__(self, channel: Channel, context: Context, planner: SettlementPlanner | None) -> None:
        super().__init__()
        self._channel = channel
        self._context = context
        self._planner = planner
        self._verifier = channel.verifier()
        self._last_commit: asyncio.Future[Outcome] | None = None
        self._offering: asyncio.Future[Outcome] | None = None
        self._behind: asyncio.Future[Outcome] | None = None
        self._settling: asyncio.Future[PaychanError | None] | None = None
        self._waiting = 0
        self._takes_over = channel.state is not State.OPEN
        """Whether the settlement began before this actor woke, or came from outside: from the chain or the signer."""
        self._last_message = context.clock()

    @property
    def channel(self) -> Channel:
        """The newest accepted version; it may not be on disk yet."""
        return self._channel

    def idle_since(self, moment: int) -> bool:
        """Say whether no work is under way and no message came after that Unix time."""
        work = (self._last_commit, self._offering, self._behind, self._settling)
        return self._last_message <= moment and not any(map(_under_way, work))

    def look_ahead(self, payment: Payment) -> None:
        """Check the signature of the next payment early, unless a cheaper check will refuse the payment."""
        channel = self._channel
        if (
            channel.state is State.OPEN
            and payment.change_sat < channel.payment.change_sat
            and change_problem(payment, channel.terms.kind, self._context.rules.dust_sat) is None
        ):
            self._verifier.look_ahead(payment)

    def on_receive(self, message: Message | PayBatch) -> Any:
        self._last_message = self._context.clock()
        if isinstance(message, Pay):
            overload = self._overload()
            return self._in_turn(message) if overload is None else Rejected(overload)
        if isinstance(message, PayBatch):
            overload = self._overload()
            message.judged = len(message.commands)
            if overload is not None:
                return [Rejected(overload)] * len(message.commands)
            return self._judge_several(message)
        if isinstance(message, Resume):
            return self._carry_on(Accepted(self._channel))
        return self._in_turn(message)

    def _overload(self) -> PaychanError | None:
        """Say why no further payment is judged: the limit of waiting payments, here or for the disk, is reached."""
        if self._waiting >= MOST_BEHIND:
            return Overloaded(waiting=self._waiting, what="payments for the application's answer", limit=MOST_BEHIND)
        return self._context.commits.overload()

    def _in_turn(self, command: Command) -> Outcome | Awaitable[Outcome]:
        """Judge a command, after the payments that wait for an answer of the application."""
        if self._offering is None and self._channel.offered is None:  # the application was never asked
            return self._judge(command)
        return self._after_offer(command) if self._offers and self._asks else self._judge(command)

    @property
    def _offers(self) -> bool:
        """Whether the application must answer first."""
        return _under_way(self._offering) or _under_way(self._behind) or self._channel.offered is not None

    @property
    def _asks(self) -> bool:
        """Whether an answer of the application could have an effect now: an unfunded channel pays for nothing."""
        return self._channel.state is not State.UNFUNDED

    def _judge(self, command: Command) -> Outcome | Awaitable[Outcome]:
        if not self.alive:  # stopped while the command waited: the record in memory may be outdated
            return Rejected(TryAgain())
        outcome = apply(self._channel, command, self._context.view(self._channel.outpoint), self._verifier)
        if isinstance(outcome, Rejected):
            return outcome
        if outcome.channel is self._channel:
            goes_on = isinstance(command, Close) and outcome.channel.state is not State.OPEN
            return self._carry_on(outcome) if goes_on else self._when_durable(outcome)
        durable = self._context.commits.put(Change(self._channel, outcome.channel), outcome, self.stop)
        self._channel, self._last_commit = outcome.channel, durable
        if outcome.channel.state is State.OPEN:
            return durable if outcome.channel.offered is None else asyncio.shield(self._question())
        self._takes_over |= isinstance(command, _FROM_OUTSIDE)
        return self._carry_on_after(durable)

    def _judge_several(self, message: PayBatch) -> Sequence[Outcome] | Awaitable[Sequence[Outcome]]:
        """Judge payments together and write only the newest; if an application is asked, judge them one by one."""
        commands = message.commands
        if self._offers or self._context.rules.asks_application:
            if message.in_parts:
                message.judged, message.waits = 1, True
            each = [command if isinstance(command, Pay) else Pay(command) for command in commands[: message.judged]]
            return _all_of([self._in_turn(command) for command in each])
        if not self.alive:
            return [Rejected(TryAgain())] * len(commands)
        view, coalesce = self._context.view(self._channel.outpoint), self._context.coalesce
        outcomes = judge(self._channel, commands, view, self._verifier, coalesce=coalesce, in_part=message.in_parts)
        message.judged, message.outcomes = len(outcomes), outcomes
        newest = newest_of(outcomes)
        if newest is None:
            return outcomes
        if newest is self._channel:
            return self._several_when_durable(outcomes, self._when_durable(Accepted(newest)))
        durable = self._context.commits.put(Change(self._channel, newest), Accepted(newest), self.stop)
        self._channel, self._last_commit = newest, durable
        if next_step(newest) is not None:
            return self._several_when_durable(outcomes, asyncio.shield(durable))
        answer = asyncio.get_running_loop().create_future()
        durable.add_done_callback(partial(_answer_several, answer, outcomes))
        return answer

    async def _several_when_durable(
        self, outcomes: Sequence[Outcome], durable: Awaitable[Outcome]
    ) -> Sequence[Outcome]:
        """Answer when the newest is durable; if a payment closed the channel, answer it after the settlement."""
        outcomes = _if_written(await durable, outcomes)
        return [
            await self._carry_on(outcome)
            if isinstance(outcome, Accepted) and outcome.channel.state is not State.OPEN
            else outcome
            for outcome in outcomes
        ]

    async def _when_durable(self, outcome: Accepted) -> Outcome:
        """Answer a repetition only after the payment that it repeats is on disk; refuse it if the write failed."""
        if self._last_commit is not None:
            committed = await asyncio.shield(self._last_commit)
            if isinstance(committed, Rejected):
                return committed
        return outcome

    async def _carry_on_after(self, durable: asyncio.Future[Outcome]) -> Outcome:
        outcome = await asyncio.shield(durable)
        return outcome if isinstance(outcome, Rejected) else await self._carry_on(outcome)

    async def _carry_on(self, outcome: Accepted) -> Outcome:
        """Settle as far as possible now, then answer with the record that results.

        A booked payment is answered as booked, even if the settlement that it started has to wait.
        """
        problem = await self._settle()
        if problem is not None and not outcome.value_sat:
            return Rejected(problem)
        return Accepted(self._channel, outcome.value_sat, outcome.application_data)

    # --- asking the application -------------------------------------------------------------------------------------

    def _after_offer(self, command: Command) -> Outcome | Awaitable[Outcome]:
        """Let a command wait for the application's answer about the offered payment; then judge in order of arrival.

        A repetition of the offered payment gets the same answer, so the application delivers once for a payer's retry.
        A forged payment is refused at once: few commands may wait, and in v1 any caller could take these places.
        """
        if isinstance(command, Pay) and command.payment == self._channel.offered:
            return asyncio.shield(self._question())
        if isinstance(command, Pay | CloseByProof | CloseByPayment):
            problem = forged(self._channel, command, self._verifier)
            if problem is not None:
                return Rejected(problem)
        before = self._behind if _under_way(self._behind) else self._question()
        self._waiting += 1
        self._behind = asyncio.create_task(self._judge_after(before, command))
        return self._behind

    async def _judge_after(self, before: asyncio.Future[Outcome], command: Command) -> Outcome:
        """Judge a command after the one before it; if the application was silent, the state machine decides."""
        try:
            await asyncio.wait([before])
        finally:
            self._waiting -= 1
        outcome = self._judge(command)
        return outcome if isinstance(outcome, Accepted | Rejected) else await outcome

    def _question(self) -> asyncio.Future[Outcome]:
        """Ask about the offered payment; callers that wait at the same time share one request."""
        if not _under_way(self._offering):
            self._offering = asyncio.create_task(self._ask_application())
        return self._offering

    async def _ask_application(self) -> Outcome:
        """Ask the application; the record keeps the offered payment until it answers, so a later request asks again."""
        enter_channel(self._channel.outpoint)
        offered = await self._when_durable(Accepted(self._channel))
        if isinstance(offered, Rejected):
            return offered
        channel, application = self._channel, self._context.application  # the state is checked again after the answer
        try:
            verdict = await application.ask(channel) if application and channel.offered else Verdict()
        except ApplicationSilent as error:
            log.warning("application did not answer", channel=str(self._channel.outpoint), reason=str(error))
            offer = self._channel.offered or self._channel.payment
            return Rejected(PaymentPending(change_sat=offer.change_sat))
        answer = Answer(verdict.refusal, verdict.data)
        if self._channel.state is not State.OPEN:  # `_settle_steps` waits for this answer, and continues by itself
            return await self._record(answer)
        answered = self._judge(answer)
        outcome = answered if isinstance(answered, Accepted | Rejected) else await answered
        return Rejected(ApplicationRefused(reason=verdict.refusal)) if verdict.refusal else outcome

    # --- settling ---------------------------------------------------------------------------------------------------

    async def _settle(self) -> PaychanError | None:
        """Carry the settlement as far as possible now; callers that wait at the same time share one run."""
        if not _under_way(self._settling):
            self._settling = asyncio.create_task(self._settle_steps())
        return await asyncio.shield(self._settling)

    async def _settle_steps(self) -> PaychanError | None:
        enter_channel(self._channel.outpoint)  # in this task's log lines
        published = False
        while (step := next_step(self._channel)) is not None:
            if step is Step.OFFER:
                if self._channel.state is State.OPEN or not await self._offer_decided():
                    return None  # the watcher resumes later
                continue
            try:
                command = await perform(step, self._channel, self._context, self._planner)
            except PaychanError as error:
                self._context.unsigned.note(self._channel.outpoint, error)
                log.warning("settlement waits", channel=str(self._channel.outpoint), step=step.name, reason=str(error))
                return error
            if command is None or (published and isinstance(command, Vanished)):
                return None  # the network shows no spend yet; the watcher resumes later
            published = published or isinstance(command, Published)
            before = self._channel
            outcome = await self._record(command)
            if isinstance(outcome, Rejected):
                return outcome.error
            if self._channel.closing and self._channel.closing.settlement:
                self._context.unsigned.note(self._channel.outpoint, None)
            if isinstance(command, TakenBack):
                return command.error
            if self._channel is before:
                return None  # the command changed nothing; a later scan may find more
        return None

    async def _offer_decided(self) -> bool:
        """Ask once more about the offered payment of a closing channel; return whether it is decided now."""
        await asyncio.wait([self._question()])
        if self._channel.offered is not None:
            await self._record(Unanswered())
        return self._channel.offered is None

    async def _record(self, command: Command) -> Outcome:
        """Make a step of the settlement durable before the next one begins."""
        outcome = apply(self._channel, command, self._context.view(self._channel.outpoint))
        if isinstance(outcome, Rejected) or outcome.channel is self._channel:
            return outcome
        durable = self._context.commits.put(Change(self._channel, outcome.channel), outcome, self.stop)
        self._channel, self._last_commit = outcome.channel, durable
        self._takes_over |= isinstance(command, _FROM_OUTSIDE)
        if self._channel.moves and self._channel.state is State.CLOSED:  # both records are in the same write
            next_one = successor(self._channel, self._context.now())
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


async def _all_of(outcomes: list[Outcome | Awaitable[Outcome]]) -> Sequence[Outcome]:
    """Wait for the outcomes that are still pending; all of them are being worked on already."""
    waiting = [asyncio.ensure_future(each) for each in outcomes if not isinstance(each, Accepted | Rejected)]
    later = iter(await asyncio.gather(*waiting))
    return [each if isinstance(each, Accepted | Rejected) else next(later) for each in outcomes]


def _if_written(committed: Outcome, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Return the outcomes, or a refusal for each if another writer was first: they were judged by an old record."""
    return [committed] * len(outcomes) if isinstance(committed, Rejected) else outcomes


def _answer_several(
    answer: asyncio.Future[Sequence[Outcome]], outcomes: Sequence[Outcome], durable: asyncio.Future[Outcome]
) -> None:
    if not answer.done() and not durable.cancelled():
        answer.set_result(_if_written(durable.result(), outcomes))


def _under_way(work: asyncio.Future[Any] | None) -> TypeGuard[asyncio.Future[Any]]:
    return work is not None and not work.done()
