"""Several payments of one channel, judged as if they had come one after the other.

A payment includes all that were made before it: who holds the newest holds the whole value. So the newest of several
that wait may be verified first, and covers the earlier ones if it holds. Callers persist the last accepted channel
alone: a record holds only the newest payment.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paychan.protocol.channel import Accepted, Channel, Outcome, Pay, Rejected, View
from paychan.protocol.machine import apply
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.sighash import SINGLE_ANYONECANPAY
from paychan.protocol.types import Sat

_replace = msgspec.structs.replace


def judge(
    channel: Channel, commands: Sequence[Pay], view: View, verifier: PaymentVerifier, *, coalesce: bool
) -> list[Outcome]:
    """Judge payments in order, each against what the ones before it left; one outcome for each.

    Without `coalesce` every signature is checked. With it the payments at the beginning that every other rule accepts
    are taken together: if the newest of them verifies, the signatures of the earlier ones are not looked at; if it does
    not, all are judged one by one. So outcomes and channel are those of judging one by one, with one exception: an
    earlier payment whose own signature is no good is accepted when a later one that includes it is good. Nobody gains
    by that: the sum of the values and the payment kept are the same, the client signed for all of it, and only the
    verified payment is ever stored.

    A payment that leaves nothing is never part of that, as it closes the channel. An application that is asked about
    each payment needs them one at a time: that is for the caller to see to.
    """
    outcomes: list[Outcome] = []
    if coalesce and len(commands) > 1:
        outcomes = _covered(channel, commands, view, verifier)
    for command in commands[len(outcomes) :]:
        newest = newest_of(outcomes)
        outcomes.append(apply(newest or channel, command, view, verifier))
    return outcomes


def newest_of(outcomes: Sequence[Outcome]) -> Channel | None:
    """The channel after all outcomes; None when nothing was accepted."""
    return next((outcome.channel for outcome in reversed(outcomes) if isinstance(outcome, Accepted)), None)


def _covered(channel: Channel, commands: Sequence[Pay], view: View, verifier: PaymentVerifier) -> list[Outcome]:
    """Book the payments at the beginning that the newest of them covers; none if that one does not hold."""
    run = _run(channel, commands, view)
    if len(run) < 2 or verifier.problem(run[-1]) is not None:
        return []
    outcomes: list[Outcome] = []
    newest, payments, seq = channel.payment, channel.payments, channel.seq
    for payment in run:
        value = Sat(newest.change_sat - payment.change_sat)
        if value or payment != newest:
            payments, seq = payments + 1, seq + 1
            channel = _replace(channel, payment=payment, payments=payments, seq=seq)
            newest = payment
        outcomes.append(Accepted(channel, value))
    return outcomes


def _run(channel: Channel, commands: Sequence[Pay], view: View) -> list[Payment]:
    """The payments at the beginning that would be accepted if all their signatures held, and leave the channel open."""
    newest = channel.payment
    if view.rules.asks_application or isinstance(apply(channel, Pay(newest), view), Rejected):
        return []  # a repetition of the newest is accepted whenever payments are
    run: list[Payment] = []
    most, least = newest.change_sat, max(view.rules.dust_sat, 1)
    for command in commands:
        payment = command.payment
        if payment.flag != SINGLE_ANYONECANPAY or not least <= payment.change_sat <= most:
            break
        most = payment.change_sat
        run.append(payment)
    return run
