"""Several payments of one channel, judged as if they had come one after the other.

A payment includes the value of all earlier ones, so the newest payment alone is worth the whole value. If several
payments wait, the newest may be verified first; if it is valid, it covers the earlier ones. Callers persist only the
last accepted channel: a record holds only the newest payment.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import gt, sub
from typing import Any, TypeAlias, overload

import msgspec

from paychan.protocol.channel import Accepted, Channel, Outcome, Pay, Rejected, View
from paychan.protocol.errors import BadSignature
from paychan.protocol.paying import Unverified, pay, precheck, verify
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.types import Sat
from paychan.protocol.wire.payment_frames import CompactPayments

_replace = msgspec.structs.replace

Commands: TypeAlias = Sequence[Pay] | CompactPayments
"""Payments with their data for the application, or without."""


MOST_CHECKS = 32
"""Most signatures that one call checks of a batch judged in parts: about a millisecond of work."""


class BatchAccepted(Sequence[Outcome]):
    """The outcomes of a batch of payments that were all accepted; an outcome object is made only when it is read."""

    def __init__(self, before: Channel, payments: Commands, changes: Sequence[Sat], newest: Payment) -> None:
        self._before, self._payments, self.changes = before, payments, changes
        self.values: Sequence[Sat] = list(map(sub, (before.payment.change_sat, *changes), changes))
        """Value that each payment brought, in satoshi."""
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
    """Judge payments in order, each against the channel that the earlier ones left; return one outcome for each.

    With `in_part` there may be outcomes for the first payments only: at most `MOST_CHECKS` payments are judged one by
    one, and none after a bad signature. So a batch of bad signatures costs its sender a delay for each one, as single
    payments do.

    Without `coalesce` every signature is checked. With `coalesce` a batch is judged as a whole if each payment leaves
    less than the one before and every other rule accepts it. If the newest payment verifies, the signatures of the
    earlier ones are not checked; if it does not verify, all are judged one by one. Outcomes and channel are those of
    judging one by one, with one exception: an earlier payment with a bad signature is accepted if the newest, which
    includes it, is valid. That is harmless: the sum of the values and the stored payment are the same, the client
    signed for all of it, and only the verified payment is ever stored.

    A payment that leaves no change is never coalesced, because it closes the channel. If the application must answer
    for each payment, the caller must pass payments one at a time.
    """
    if coalesce and len(commands) > 1:
        covered = _covered(channel, commands, view, verifier)
        if covered is not None:
            return covered
    outcomes: list[Outcome] = []
    for command in commands[:MOST_CHECKS] if in_part else commands:
        outcome = pay(channel, command if isinstance(command, Pay) else Pay(command), view, verifier)
        if isinstance(outcome, Accepted):
            channel = outcome.channel
        outcomes.append(outcome)
        if in_part and _is_bad(outcome):
            break
    return outcomes


def ends_with_bad_signature(outcomes: Sequence[Outcome]) -> bool:
    """Say whether the last of these outcomes is a bad signature."""
    return not isinstance(outcomes, BatchAccepted) and bool(outcomes) and _is_bad(outcomes[-1])


def count_without_value(outcomes: Sequence[Outcome]) -> int:
    """Count the payments that brought no value: refused, repeated, or of 0 sat."""
    if isinstance(outcomes, BatchAccepted):
        return 0  # each left less than the one before
    return sum(isinstance(each, Rejected) or not each.value_sat for each in outcomes)


def commands_after(commands: Commands, judged: int) -> Commands:
    """Return the payments after the first `judged` ones."""
    return commands.behind(judged) if isinstance(commands, CompactPayments) else commands[judged:]


def newest_of(outcomes: Sequence[Outcome]) -> Channel | None:
    """Return the channel after all outcomes; None if none was accepted."""
    if isinstance(outcomes, BatchAccepted):
        return outcomes.channel
    return next((outcome.channel for outcome in reversed(outcomes) if isinstance(outcome, Accepted)), None)


def _covered(channel: Channel, commands: Commands, view: View, verifier: PaymentVerifier) -> BatchAccepted | None:
    """Book payments that the newest of them covers; None if they can't be coalesced or the newest does not verify."""
    if isinstance(commands, CompactPayments):
        changes = commands.changes
    else:
        flag = channel.terms.kind.change_flag
        if not all(command.payment.flag == flag for command in commands):
            return None
        changes = [command.payment.change_sat for command in commands]
    newest = channel.payment
    if changes[-1] < max(view.rules.dust_sat, 1) or not all(map(gt, (newest.change_sat, *changes), changes)):
        return None
    payment = _payment(commands[-1])
    step = precheck(channel, Pay(payment), view)
    if view.rules.asks_application or not isinstance(step, Unverified) or isinstance(verify(step, verifier), Rejected):
        return None
    return BatchAccepted(channel, commands, changes, payment)


def _is_bad(outcome: Outcome) -> bool:
    return isinstance(outcome, Rejected) and isinstance(outcome.error, BadSignature)


def _payment(command: Pay | Payment) -> Payment:
    return command.payment if isinstance(command, Pay) else command
