"""The actor of one open channel: it handles all commands for the channel in sequence.

The rules are in `protocol.state_machine`. The actor only applies them, persists the new record, uses it, performs the
next step that the record needs, and answers. Persist, use and answer are adjacent lines in `_judge`. Several payments
may be between these lines at a time: each is judged against the newest accepted record, and none is answered before its
record is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeAlias

import msgspec
import structlog
from msgspec import Struct

from actors.context import Context
from actors.runtime import Told
from actors.settling.actor import FROM_OUTSIDE, SettlingActor, under_way
from actors.settling.planner import SettlementPlanner
from paychan.callback.base import ApplicationSilent, Verdict
from paychan.protocol.channel import (
    Accepted,
    Answer,
    Channel,
    Close,
    CloseByPayment,
    CloseByProof,
    Command,
    Outcome,
    Pay,
    Rejected,
    State,
)
from paychan.protocol.charges import Charge, Delivered
from paychan.protocol.errors import (
    ApplicationRefused,
    InternalError,
    Overloaded,
    PaychanError,
    PaymentPending,
    TryAgain,
)
from paychan.protocol.forgery import forged
from paychan.protocol.paying import Verified, book, pay
from paychan.protocol.payment_batch import Commands, judge, newest_of
from paychan.protocol.state_machine import apply
from paychan.store.base import Change
from paychan.tracing import NUMBERS, REQUEST, enter_channel

log = structlog.get_logger("channel")

MOST_BEHIND = 64
"""Most payments of a channel that may wait for the application's answer to an earlier one."""


class Resume(Struct, frozen=True):
    """Continue an unfinished settlement."""


class Payments(Told):
    """One payment, or several that came together. `reply` is called with this message once `outcomes` are final.

    Final means: each accepted payment is on disk. With `in_parts` the actor judges only as many as one turn of the loop
    has time for, and none after a bad signature, which the caller delays before it sends the rest. `judged` and
    `outcomes` are set as soon as the message is in the inbox; they tell the caller how far the actor came.
    """

    commands: Commands
    reply: Callable[[Payments], object]
    in_parts: bool = False
    verified: Verified | None = None
    """The only payment, if the caller has checked it already; the actor books it if the channel is still the same."""
    judged: int = 0
    """Number of judged payments, from the first on."""
    outcomes: Sequence[Outcome] = ()
    """Their outcomes; before `reply` is called, the caller must not answer with them."""
    waits: bool = False
    """Whether only the final answer has the outcomes, because the application is asked about each payment."""
    failed: bool = False
    """Whether the actor failed or stopped before the payments were judged."""

    def answer(self, outcomes: Sequence[Outcome]) -> None:
        """Reply with final outcomes. A bug in the caller's reply is logged: it must not stop the actor."""
        self.outcomes = outcomes
        try:
            self.reply(self)
        except Exception:
            log.exception("answer failed")

    def written(self, outcome: Outcome) -> None:
        """Reply after the write: with the outcomes, or with a refusal for each if another writer was first."""
        if isinstance(outcome, Rejected):  # they were judged by an outdated record
            self.outcomes = [outcome] * len(self.outcomes)
        self.reply(self)

    def unhandled(self) -> None:
        self.judged, self.failed = self.judged or len(self.commands), True
        self.answer([Rejected(InternalError())] * self.judged)


Message: TypeAlias = Command | Resume


class ChannelActor(SettlingActor):
    """Owns the newest version of one channel's record while it is awake."""

    def __init__(self, channel: Channel, context: Context, planner: SettlementPlanner | None) -> None:
        super().__init__(channel, context, planner)
        self.verifier = channel.verifier()
        """Checks the channel's payments."""
        self._offering: asyncio.Future[Outcome] | None = None
        self._behind: asyncio.Future[Outcome] | None = None
        self._tasks: set[asyncio.Task[Sequence[Outcome]]] = set()
        self._done: set[bytes] = set()
        """Answered requests, which the next charge marks in the record."""
        self._waiting = 0
        self._last_message = context.clock()

    def idle_since(self, moment: int) -> bool:
        """Say whether no work is under way and no message came after that Unix time."""
        if self._last_message <= moment and (unmarked := self._unmarked()):
            self._judge(Delivered(unmarked))  # and sleep when that is on disk
        if self._context.commits.written < self._group or self._tasks:
            return False
        return self._last_message <= moment and not any(map(under_way, (self._offering, self._behind, self._settling)))

    def on_receive(self, message: Message | Payments) -> Any:
        if not self._context.observers.wants_payments and isinstance(message, Payments) and self._book(message):
            return None  # nothing that follows writes a log line
        request = REQUEST.set(REQUEST.get() or next(NUMBERS))
        try:
            if not isinstance(message, Payments):
                return self._take(message)
            if not self._book(message):
                self._judge_payments(message)
        finally:
            REQUEST.reset(request)

    def _take(self, message: Message) -> Any:
        self._last_message = self._context.clock()
        if isinstance(message, Resume):
            return self._carry_on_after(self._when_durable(Accepted(self.channel)))
        if isinstance(message, Delivered):
            self._done |= message.requests
            return Accepted(self.channel)
        if isinstance(message, Charge):
            overload = self._overload()
            if overload is not None:
                return Rejected(overload)
            message = msgspec.structs.replace(message, done=self._unmarked())
        return self._in_turn(message)

    def _unmarked(self) -> frozenset[bytes]:
        """Return the answered requests that the record does not have as answered: a refused charge marks none."""
        if self._done:
            self._done &= {each.request for each in self.channel.deliveries if not each.is_done}
        return frozenset(self._done)

    def _overload(self) -> PaychanError | None:
        """Say why no further payment is judged: the limit of waiting payments, here or for the disk, is reached."""
        if self._waiting >= MOST_BEHIND:
            return Overloaded(waiting=self._waiting, what="payments for the application's answer", limit=MOST_BEHIND)
        return self._context.commits.overload()

    def _in_turn(self, command: Command) -> Outcome | Awaitable[Outcome]:
        """Judge a command, after the payments that wait for an answer of the application."""
        if self._offering is None and self.channel.offered is None:  # the application was never asked
            return self._judge(command)
        return self._after_offer(command) if self._offers and self._asks else self._judge(command)

    @property
    def _offers(self) -> bool:
        """Whether the application must answer first."""
        return under_way(self._offering) or under_way(self._behind) or self.channel.offered is not None

    @property
    def _asks(self) -> bool:
        """Whether an answer of the application could have an effect now: an unfunded channel pays for nothing."""
        return self.channel.state is not State.UNFUNDED

    def _judge(self, command: Command) -> Outcome | Awaitable[Outcome]:
        if not self.alive:  # stopped while the command waited: the record in memory may be outdated
            return Rejected(TryAgain())
        outcome = apply(self.channel, command, self._context.view(self.channel.outpoint), self.verifier)
        if isinstance(outcome, Rejected):
            return outcome
        if outcome.channel is self.channel:
            goes_on = isinstance(command, Close) and outcome.channel.state is not State.OPEN
            durable = self._when_durable(outcome)
            return self._carry_on_after(durable) if goes_on else durable
        written = self._put(outcome.channel, outcome)
        if outcome.channel.state is State.OPEN:
            return written if outcome.channel.offered is None else asyncio.shield(self._question())
        self._takes_over |= isinstance(command, FROM_OUTSIDE)
        return self._carry_on_after(written)

    def _book(self, message: Payments) -> bool:
        """Book one payment whose signature was checked: the way of nearly all payments.

        False: the payments of this message need another way, because they are several, or the channel changed since
        that check, or this payment closes it.
        """
        verified = message.verified
        if verified is None or verified.channel is not self.channel or self._behind is not None:
            return False
        outcome, commits = book(verified), self._context.commits
        if isinstance(outcome, Accepted):
            newest = outcome.channel
            if newest.state is not State.OPEN:
                return False
            commits.add(Change(self.channel, newest), outcome, message.written, self.stop)
            self.channel, self._group, self._last_message = newest, commits.gathering, verified.view.now
            message.judged, message.outcomes = 1, (outcome,)
        else:
            message.judged = 1
            message.answer((outcome,))
        return True

    def _judge_payments(self, message: Payments) -> None:
        """Judge payments together and write only the newest; if an application is asked, judge them one by one."""
        commands, overload = message.commands, self._overload()
        message.judged = len(commands)
        if overload is not None:
            message.answer([Rejected(overload)] * len(commands))
            return
        was_asked = self._offering is not None or self._behind is not None or self.channel.offered is not None
        if (was_asked and self._offers) or self._context.rules.asks_application:
            self._last_message = self._context.clock()
            if message.in_parts:
                message.judged, message.waits = 1, True
            each = [command if isinstance(command, Pay) else Pay(command) for command in commands[: message.judged]]
            self._answer_later(message, _all_of([self._in_turn(command) for command in each]))
            return
        view, coalesce = self._context.view(self.channel.outpoint), self._context.coalesce
        self._last_message = view.now
        if len(commands) == 1:
            command = commands[0]
            outcome = pay(self.channel, command if isinstance(command, Pay) else Pay(command), view, self.verifier)
            message.outcomes = (outcome,)
            self._persist(message, outcome.channel if isinstance(outcome, Accepted) else None)
            return
        outcomes = judge(self.channel, commands, view, self.verifier, coalesce=coalesce, in_part=message.in_parts)
        message.judged, message.outcomes = len(outcomes), outcomes
        self._persist(message, newest_of(outcomes))

    def _persist(self, message: Payments, newest: Channel | None) -> None:
        """Persist the channel after the payments of a message, use it, and let the message reply."""
        outcomes, commits = message.outcomes, self._context.commits
        if newest is None:
            message.answer(outcomes)
        elif newest is self.channel:
            self._answer_later(message, self._several_when_durable(outcomes, self._when_durable(Accepted(newest))))
        elif newest.state is State.OPEN:
            commits.add(Change(self.channel, newest), Accepted(newest), message.written, self.stop)
            self.channel, self._group = newest, commits.gathering
        else:
            durable = self._put(newest, Accepted(newest))
            self._answer_later(message, self._several_when_durable(outcomes, durable))

    def _answer_later(self, message: Payments, work: Coroutine[Any, Any, Sequence[Outcome]]) -> None:
        """Reply when the outcomes are known, also if the caller of this message is gone."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._answered, message))

    def _answered(self, message: Payments, task: asyncio.Task[Sequence[Outcome]]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            message.answer(task.result())
        else:
            log.error("payment failed", channel=str(self.channel.outpoint), exc_info=error)
            message.unhandled()

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
        await self._context.commits.until_written(self._group)
        return outcome if self.alive else Rejected(TryAgain())  # a conflict has stopped this actor

    async def _carry_on_after(self, durable: Awaitable[Outcome]) -> Outcome:
        """Settle once the record is on disk: no signature is asked for a version that a crash could undo."""
        outcome = await asyncio.shield(durable)
        return outcome if isinstance(outcome, Rejected) else await self._carry_on(outcome)

    async def _carry_on(self, outcome: Accepted) -> Outcome:
        """Settle as far as possible now, then answer with the record that results.

        A booked payment is answered as booked, even if the settlement that it started has to wait.
        """
        problem = await self._settle()
        if problem is not None and not outcome.value_sat:
            return Rejected(problem)
        return Accepted(self.channel, outcome.value_sat, outcome.application_data)

    # --- asking the application -------------------------------------------------------------------------------------

    def _after_offer(self, command: Command) -> Outcome | Awaitable[Outcome]:
        """Let a command wait for the application's answer about the offered payment; then judge in order of arrival.

        A repetition of the offered payment gets the same answer, so the application delivers once for a payer's retry.
        A forged payment is refused at once: few commands may wait, and in v1 any caller could take these places.
        """
        if isinstance(command, Pay) and command.payment == self.channel.offered:
            return asyncio.shield(self._question())
        if isinstance(command, Pay | CloseByProof | CloseByPayment):
            problem = forged(self.channel, command, self.verifier)
            if problem is not None:
                return Rejected(problem)
        before = self._behind if under_way(self._behind) else self._question()
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
        if not under_way(self._offering):
            self._offering = asyncio.create_task(self._ask_application())
        return self._offering

    async def _ask_application(self) -> Outcome:
        """Ask the application; the record keeps the offered payment until it answers, so a later request asks again."""
        enter_channel(self.channel.outpoint)
        offered = await self._when_durable(Accepted(self.channel))
        if isinstance(offered, Rejected):
            return offered
        channel, application = self.channel, self._context.application  # the state is checked again after the answer
        try:
            verdict = await application.ask(channel) if application and channel.offered else Verdict()
        except ApplicationSilent as error:
            log.warning("application did not answer", channel=str(self.channel.outpoint), reason=str(error))
            offer = self.channel.offered or self.channel.payment
            return Rejected(PaymentPending(change_sat=offer.change_sat))
        answer = Answer(verdict.refusal, verdict.data)
        if self.channel.state is not State.OPEN:  # `_settle_steps` waits for this answer, and continues by itself
            return await self._record(answer)
        answered = self._judge(answer)
        outcome = answered if isinstance(answered, Accepted | Rejected) else await answered
        return Rejected(ApplicationRefused(reason=verdict.refusal)) if verdict.refusal else outcome


async def _all_of(outcomes: list[Outcome | Awaitable[Outcome]]) -> Sequence[Outcome]:
    """Wait for the outcomes that are still pending; all of them are being worked on already."""
    waiting = [asyncio.ensure_future(each) for each in outcomes if not isinstance(each, Accepted | Rejected)]
    later = iter(await asyncio.gather(*waiting))
    return [each if isinstance(each, Accepted | Rejected) else next(later) for each in outcomes]


def _if_written(committed: Outcome, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Return the outcomes, or a refusal for each if another writer was first: they were judged by an old record."""
    return [committed] * len(outcomes) if isinstance(committed, Rejected) else outcomes
