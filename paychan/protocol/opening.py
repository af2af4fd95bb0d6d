"""The start of a channel: a client opens it, or it continues at the change output of a withdrawal."""

from __future__ import annotations

import msgspec

from paychan.protocol.channel import Accepted, Channel, CloseReason, Opening, Outcome, Rejected, State, View
from paychan.protocol.closing import close
from paychan.protocol.errors import (
    ChainUnavailable,
    FundingUnconfirmed,
    PaymentShort,
    ValueBackwards,
)
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.terms import expiry_problem
from paychan.protocol.types import OutPoint, Sat, UnixTime

_NO_SIGNATURE = bytes(8)
"""Stands in a payment of 0 sat that the client never made: the signer would refuse it, and it has no value."""


def open_channel(opening: Opening, view: View, verifier: PaymentVerifier | None = None) -> Outcome:
    """Judge a new channel in the order of RBPCP §5.2; it starts in CLOSING if the payment leaves no change."""
    rules, payment = view.rules, opening.payment
    if view.frozen:
        return Rejected(ChainUnavailable(reason=view.frozen))
    problem = expiry_problem(opening.terms.expiry.unix_time, view)
    if problem is not None:
        return Rejected(problem)
    need = rules.confirmations_needed(opening.funding_sat)
    if opening.confirmations < need:
        return Rejected(FundingUnconfirmed(got=opening.confirmations, need=need))
    if payment.change_sat > opening.funding_sat:
        return Rejected(ValueBackwards(got_sat=payment.change_sat, need_sat=opening.funding_sat))
    problem = (verifier or opening.verifier).problem(payment, rules.dust_sat)
    value = Sat(opening.funding_sat - payment.change_sat)
    if problem is None and value < opening.price_sat:
        problem = PaymentShort(got_sat=value, need_sat=opening.price_sat)
    if problem is not None:
        return Rejected(problem)
    channel = Channel(
        terms=opening.terms,
        outpoint=opening.outpoint,
        funding_sat=opening.funding_sat,
        change_script=opening.change_script,
        payment=payment,
        state=State.OPEN,
        seq=1,
        opened_at=view.now,
        secret=opening.secret,
        spent_sat=value,  # the price of the opening, or what an earlier record of this channel delivered: no credit
    )
    return close(channel, CloseReason.DRAINED, view, value) if payment.change_sat == 0 else Accepted(channel, value)


def successor(moved: Channel, now: UnixTime) -> Channel:
    """Return the channel that continues at the change output of a deep withdrawal, with nothing paid yet.

    The caller writes both records together, so that every payment counts once, on one of them.

    Raises:
        ValueError: it has not moved.
    """
    if moved.closing is None or not moved.closing.spent_by:
        msg = f"{moved.outpoint} has not moved"
        raise ValueError(msg)
    change_sat = moved.moved_sat
    return msgspec.structs.replace(
        moved,
        outpoint=OutPoint(moved.closing.spent_by, 0),
        funding_sat=change_sat,
        payment=Payment(change_sat, _NO_SIGNATURE, moved.terms.kind.flag(change_sat)),
        state=State.OPEN,
        seq=1,
        opened_at=now,
        payments=0,
        closing=None,
        withdrawn_sat=Sat(moved.withdrawn_sat + moved.funding_sat - change_sat),
        spent_sat=max(moved.spent_sat, Sat(moved.spent_sat + moved.payment.change_sat - change_sat)),
    )
