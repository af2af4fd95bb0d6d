"""Compute the change after a payment. These rules keep the payer from paying more than intended."""

from __future__ import annotations

from paychan.client.errors import AmountTooSmall, InsufficientFunds, OverLimit, WouldLeaveDust, WouldTakeBack
from paychan.client.limits import Limits
from paychan.client.record import ChannelRecord
from paychan.protocol.types import Sat


def next_change(record: ChannelRecord, amount_sat: int, limits: Limits, *, drain: bool) -> Sat:
    """Return the change value of the next payment, counted from the newest one that both sides know; 0 with `drain`.

    Raises:
        AmountTooSmall: a negative amount.
        OverLimit: more than the payer's own limit for one payment.
        InsufficientFunds: more than is left.
        WouldLeaveDust: the rest is too small to be paid back.
        WouldTakeBack: less than a payment that was signed and refused; the server could use that one instead.
    """
    if drain:
        if record.agreed_sat > limits.payment_sat:
            raise OverLimit(got_sat=record.agreed_sat, limit_sat=limits.payment_sat)
        return Sat(0)
    if amount_sat < 0:
        raise AmountTooSmall(got_sat=amount_sat, need_sat=0)
    if amount_sat > limits.payment_sat:
        raise OverLimit(got_sat=amount_sat, limit_sat=limits.payment_sat)
    change = record.agreed_sat - amount_sat
    if change < 0:
        raise InsufficientFunds(want_sat=amount_sat, left_sat=record.agreed_sat)
    if change < record.dust_sat:
        most = max(0, record.agreed_sat - record.dust_sat)
        raise WouldLeaveDust(change_sat=change, dust_sat=record.dust_sat, most_sat=most)
    if change > record.left_sat:
        raise WouldTakeBack(got_sat=amount_sat, need_sat=record.pending_sat)
    return Sat(change)
