"""Several payments of one channel, judged as if they had come one after the other.

A payment includes all that were made before it: who holds the newest holds the whole value. So the newest of several
that wait may be verified first, and covers the earlier ones if it holds. Callers persist the last accepted channel
alone: a record holds only the newest payment.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import gt, sub
from typing import Any, TypeAlias, overload

import msgspec

from paychan.protocol.channel import Accepted, Channel, Outcome, Pay, Rejected, View
from paychan.protocol.errors import BadSignature
from paychan.protocol.kinds.sighash import SINGLE_ANYONECANPAY
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat
from paychan.protocol.wire.payment_frames import CompactPayments

_replace = msgspec.structs.replace

Commands: TypeAlias = Sequence[Pay] | CompactPayments
"""Payments with what they tell an application, or without."""


MOST_CHECKS = 32
"""Signatures that are checked in one go of a row judged in parts: about a millisecond."""


class BatchAccepted(Sequence[Outcome]):
    """The outcomes of a row of payments that were all accepted, made into objects only where one is looked at."""

    def __init__(self, before: Channel, payments: Commands, changes: Sequence[Sat], newest: Payment) -> None:
        self._before, self._payments, self.changes = before, payments, changes
        self.values: Sequence[Sat] = list(map(sub, (before.payment.change_sat, *changes), changes))
        """What each brought, in satoshi."""
        self.channel = self._after(len(changes), newest)

    def __len__(self) -> int:
        return len(self.changes)

    @overload
    def __getitem__(self, index: int) -> Outcome: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Outcome]: ...

    def __getitem__(self, index: Any) -> Any:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[each] for each in numbers]
        return Accepted(self._after(numbers + 1, _payment(self._payments[numbers])), self.values[numbers])

    def _after(self, count: int, payment: Payment) -> Channel:
        before = self._before
        return _replace(before, payment=payment, payments=before.payments + count, seq=before.seq + count)


def judge(
    channel: Channel,
    commands: Commands,
    view: View,
    verifier: PaymentVerifier,
    *,
    coalesce: bool,
    in_part: bool = False,
) -> Sequence[Outcome]:
    """Judge payments in order, each against what the ones before it left; one outcome for each.

    With `in_part` there may be outcomes for the first of them only: no more than `MOST_CHECKS` are judged one by one, and
    none behind a bad signature. So a row of bad signatures costs its sender a wait for each, as single payments do.

    Without `coalesce` every signature is checked. With it payments of which each leaves less than the one before, and
    which every other rule accepts, are taken together: if the newest of them verifies, the signatures of the earlier ones
    are not looked at; if it does not, all are judged one by one. So outcomes and channel are those of judging one by
    one, with one exception: an earlier payment whose own signature is no good is accepted when the newest, which
    includes it, is good. Nobody gains by that: the sum of the values and the payment kept are the same, the client
    signed for all of it, and only the verified payment is ever stored.

    A payment that leaves nothing is never part of that, as it closes the channel. An application that is asked about
    each payment needs them one at a time: that is for the caller to see to.
    """
    if coalesce and len(commands) > 1:
        covered = _covered(channel, commands, view, verifier)
        if covered is not None:
            return covered
    outcomes: list[Outcome] = []
    for command in commands[:MOST_CHECKS] if in_part else commands:
        outcome = apply(channel, command if isinstance(command, Pay) else Pay(command), view, verifier)
        if isinstance(outcome, Accepted):
            channel = outcome.channel
        outcomes.append(outcome)
        if in_part and _is_bad(outcome):
            break
    return outcomes


def ends_badly(outcomes: Sequence[Outcome]) -> bool:
    """Whether the last of these is a bad signature."""
    return not isinstance(outcomes, BatchAccepted) and bool(outcomes) and _is_bad(outcomes[-1])


def empty_of(outcomes: Sequence[Outcome]) -> int:
    """How many of these payments brought nothing: refused, repeated, or of no value."""
    if isinstance(outcomes, BatchAccepted):
        return 0  # each left less than the one before
    return sum(isinstance(each, Rejected) or not each.value_sat for each in outcomes)


def rest_of(commands: Commands, judged: int) -> Commands:
    """The payments behind those that were judged."""
    return commands.behind(judged) if isinstance(commands, CompactPayments) else commands[judged:]


def newest_of(outcomes: Sequence[Outcome]) -> Channel | None:
    """The channel after all outcomes; None when nothing was accepted."""
    if isinstance(outcomes, BatchAccepted):
        return outcomes.channel
    return next((outcome.channel for outcome in reversed(outcomes) if isinstance(outcome, Accepted)), None)


def _covered(channel: Channel, commands: Commands, view: View, verifier: PaymentVerifier) -> BatchAccepted | None:
    """Book payments that the newest of them covers; None if they are no such row, or that one does not hold."""
    if isinstance(commands, CompactPayments):
        changes = commands.changes
    elif all(command.payment.flag == SINGLE_ANYONECANPAY for command in commands):
        changes = [command.payment.change_sat for command in commands]
    else:
        return None
    newest = channel.payment
    if changes[-1] < max(view.rules.dust_sat, 1) or not all(map(gt, (newest.change_sat, *changes), changes)):
        return None
    if view.rules.asks_application or isinstance(apply(channel, Pay(newest), view), Rejected):
        return None  # a repetition of the newest is accepted whenever payments are
    payment = _payment(commands[-1])
    return BatchAccepted(channel, commands, changes, payment) if verifier.problem(payment) is None else None


def _is_bad(outcome: Outcome) -> bool:
    return isinstance(outcome, Rejected) and isinstance(outcome.error, BadSignature)


def _payment(command: Pay | Payment) -> Payment:
    return command.payment if isinstance(command, Pay) else command
