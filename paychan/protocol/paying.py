"""The three steps of a payment: precheck, verify, book (RBPCP §7.1).

    Pay ──precheck──▶ Unverified ──verify──▶ Verified ──book──▶ Accepted
              └─────────────┴──────────┬────────┘
                                       ▼
                               Rejected, or Accepted for a repetition

Each step is pure, and its result is the argument of the next one: a payment can't be booked without its signature
check. `state_machine.apply` takes the steps in sequence. The fast path takes each step for all payments that came in
one turn of the loop, because code and data of a step then stay in the CPU's caches. `verify` does all the expensive
work; the other two compare numbers.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from paychan.protocol.channel import Accepted, Channel, CloseReason, Outcome, Pay, Rejected, State, View
from paychan.protocol.closing import close
from paychan.protocol.ending import end_of
from paychan.protocol.errors import ChainUnavailable, ChannelExpiring, PaymentPending
from paychan.protocol.forgery import forged, not_below
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.types import Sat

_replace = msgspec.structs.replace


class Unverified(Struct, frozen=True):
    """A payment that the channel may accept now, if the client has signed it."""

    channel: Channel
    """The version of the channel that it was checked against."""
    command: Pay
    view: View


class Verified(Struct, frozen=True):
    """A payment that the client has signed, and that the channel may accept."""

    channel: Channel
    command: Pay
    view: View


def pay(channel: Channel, command: Pay, view: View, verifier: PaymentVerifier) -> Outcome:
    """Take the three steps in sequence."""
    checked = precheck(channel, command, view)
    if not isinstance(checked, Unverified):
        return checked
    verified = verify(checked, verifier)
    return book(verified) if isinstance(verified, Verified) else verified


def precheck(channel: Channel, command: Pay, view: View) -> Outcome | Unverified:
    """Decide all that does not need the signature; a repetition of the newest payment is accepted here.

    In v1 any caller that knows the outpoint can send a payment, so a refusal of this step names no numbers of the
    channel but its expiry.
    """
    if channel.state is not State.OPEN:
        return Rejected(end_of(channel))
    if view.frozen:
        return Rejected(ChainUnavailable(reason=view.frozen))
    if channel.offered is not None:
        return Rejected(forged(channel, command) or PaymentPending(change_sat=channel.offered.change_sat))
    expiry, period = channel.terms.expiry, view.rules.settlement_period_seconds
    if expiry.lock_time - view.now <= period and (left := expiry.left(view) - period) <= 0:  # a height is asked always
        return Rejected(ChannelExpiring(now_unix=view.now, limit_unix=view.now + left))
    if command.payment == channel.payment:
        return Accepted(channel)
    return Unverified(channel, command, view)


def verify(payment: Unverified, verifier: PaymentVerifier) -> Verified | Rejected:
    """Check flag, change value and signature; `verifier` is the channel's."""
    problem = verifier.problem(payment.command.payment, payment.view.rules.dust_sat)
    return Verified(payment.channel, payment.command, payment.view) if problem is None else Rejected(problem)


def book(verified: Verified) -> Outcome:
    """Make the payment the newest, or the one that is offered to the application.

    Equal change is a payment of 0 sat, and is accepted. The caller stores the channel before it answers.
    """
    channel, payment, view = verified.channel, verified.command.payment, verified.view
    if payment.change_sat > channel.payment.change_sat:
        return Rejected(not_below(channel, payment))
    outcome = book_payment(channel, payment, view)
    if view.rules.asks_application and isinstance(outcome, Accepted) and outcome.value_sat:
        data, seq = verified.command.application_data, channel.seq + 1
        offered = _replace(channel, offered=payment, offered_data=data, offered_seq=seq, seq=seq)
        return Accepted(offered, outcome.value_sat)
    return outcome


def book_payment(channel: Channel, payment: Payment, view: View) -> Outcome:
    """Book a payment that was verified, now or when it was offered; one that leaves no change closes the channel.

    The value is credit, unless the application delivers for it, or the record is from a backup: see `credit`.
    """
    value = Sat(channel.payment.change_sat - payment.change_sat)
    booked = _replace(
        channel,
        payment=payment,
        payments=channel.payments + 1,
        offered=None,
        offered_data="",
        restored=False,
        seq=channel.seq + 1,
        spent_sat=_spent(channel, value, view),
    )
    return close(booked, CloseReason.DRAINED, view, value) if payment.change_sat == 0 else Accepted(booked, value)


def _spent(channel: Channel, value: Sat, view: View) -> Sat:
    if channel.restored:
        return Sat(channel.accepted_sat + value)
    return Sat(channel.spent_sat + value) if view.rules.asks_application else channel.spent_sat
