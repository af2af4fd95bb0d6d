"""Credit: accepted payments for which nothing was delivered yet, and the requests that are paid from it.

    accepted_sat    value of all payments of the channel                         never falls
    spent_sat       what was delivered for, or is being delivered for            charge raises it, release lowers it
    credit_sat      accepted_sat - spent_sat                                     never below 0

A request is charged before the seller works for it, in the same record as the payment that came with it: both are on
disk, or neither is. A payment worth more than the request leaves credit for the next one. If nothing was delivered, the
charge is released, and the client pays the next request from the credit.

The record remembers the newest requests by their ids. A request that is repeated, because its answer was lost, is not
charged again. A metered answer raises the total of its request, unit by unit.

Opening payments are no credit: they are the price of the opening. Payments that the application accepts
(`Rules.asks_application`) are no credit: the application delivers for them. Nor are payments that only the signer or
the chain knows: the server that took them delivered for them.

A record from a backup lacks the charges since. So the first payment on it brings no credit: it pays for the request with
which it came, the rest of its value and the credit of the backup count as spent.
"""

from __future__ import annotations

import msgspec

from paychan.protocol.channel import (
    Accepted,
    Channel,
    Outcome,
    Pay,
    Rejected,
    State,
    View,
)
from paychan.protocol.charges import Charge, Delivered, Delivery, Release
from paychan.protocol.ending import end_of
from paychan.protocol.forgery import not_below
from paychan.protocol.paying import Unverified, book_payment, precheck, verify
from paychan.protocol.payment import PaymentVerifier
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.unpaid import CreditTooLow, TooManyDeliveries, UnknownDelivery

MOST_UNDER_WAY = 256
"""Most requests of a channel whose answers have not begun to leave."""

MOST_KEPT = 64
"""Most answered requests that a record remembers."""

KEPT_SECONDS = 600
"""Time for which an answered request is remembered."""

ABANDONED_SECONDS = 3600
"""Time after which a request without an answer counts as answered: the process that served it has ended."""

_replace = msgspec.structs.replace


def charge(channel: Channel, command: Charge, view: View, verifier: PaymentVerifier | None = None) -> Outcome:
    """Book the payment, if one came, and raise the charge of the request to its total; or refuse, and change nothing.

    Only an open channel is charged, under the rules for a payment (`paying`). A payment that leaves no change closes the
    channel, and the request is charged. `value_sat` of the outcome is the value of the payment.
    """
    paid = _paid(channel, command, view, verifier or channel.verifier())
    if isinstance(paid, Rejected):
        return paid
    known = find_delivery(channel, command.request)
    extra_sat = Sat(command.total_sat - (known.charged_sat if known else 0))
    deliveries = _after(channel.deliveries, command.done, view.now)
    if extra_sat <= 0:
        return paid
    credit_sat = paid.value_sat if channel.restored else paid.channel.credit_sat
    if credit_sat < extra_sat:
        return Rejected(CreditTooLow(got_sat=credit_sat, need_sat=extra_sat))
    if known is None and len(deliveries) >= MOST_UNDER_WAY:
        under_way = sum(not each.is_done for each in deliveries)
        if under_way >= MOST_UNDER_WAY:
            return Rejected(TooManyDeliveries(got=under_way, limit=MOST_UNDER_WAY))
    others = deliveries if known is None else tuple(each for each in deliveries if each.request != command.request)
    newest = Delivery(command.request, command.total_sat, view.now, is_done=known is not None and known.is_done)
    spent_sat = paid.channel.accepted_sat if channel.restored else Sat(paid.channel.spent_sat + extra_sat)
    seq = channel.seq + 1
    return Accepted(_replace(paid.channel, spent_sat=spent_sat, deliveries=(*others, newest), seq=seq), paid.value_sat)


def release(channel: Channel, command: Release, _view: View, _verifier: object = None) -> Outcome:
    """Lower the charge of a request to what was delivered; a request that costs nothing is forgotten.

    Also after the channel left OPEN, where it has no effect on the settlement. A channel that continues elsewhere
    refuses: its successor has the charge.
    """
    if channel.moves and channel.state is State.CLOSED:
        return Rejected(end_of(channel))
    known = find_delivery(channel, command.request)
    if known is None:
        return Rejected(UnknownDelivery(request=command.request.hex()))
    given_sat = known.charged_sat - command.to_sat
    if given_sat <= 0:
        return Accepted(channel)
    lowered = (_replace(known, charged_sat=command.to_sat),) if command.to_sat else ()
    others = tuple(each for each in channel.deliveries if each.request != command.request)
    spent_sat = Sat(channel.spent_sat - given_sat)
    return Accepted(_replace(channel, spent_sat=spent_sat, deliveries=(*others, *lowered)))


def mark_delivered(channel: Channel, command: Delivered, view: View, _verifier: object = None) -> Outcome:
    """Remember which requests were answered, so that the record may forget them first."""
    deliveries = _after(channel.deliveries, command.requests, view.now)
    return Accepted(channel if deliveries == channel.deliveries else _replace(channel, deliveries=deliveries))


def find_delivery(channel: Channel, request: bytes) -> Delivery | None:
    """Return what the record remembers of a request."""
    for each in reversed(channel.deliveries):
        if each.request == request:
            return each
    return None


def _paid(channel: Channel, command: Charge, view: View, verifier: PaymentVerifier) -> Accepted | Rejected:
    """Take the three steps of the payment, without asking the application: the caller of a charge delivers."""
    payment = command.payment or channel.payment
    checked = precheck(channel, Pay(payment), view)
    if not isinstance(checked, Unverified):
        return checked
    verified = verify(checked, verifier)
    if isinstance(verified, Rejected):
        return verified
    if payment.change_sat > channel.payment.change_sat:
        return Rejected(not_below(channel, payment))
    rules = _replace(view.rules, asks_application=False)
    return (
        book_payment(channel, payment, _replace(view, rules=rules))
        if payment.change_sat < channel.payment.change_sat
        else Accepted(channel)
    )


def _after(deliveries: tuple[Delivery, ...], done: frozenset[bytes], now: UnixTime) -> tuple[Delivery, ...]:
    """Mark requests as answered, and forget old ones; of more answered ones than `MOST_KEPT`, the first are forgotten."""
    kept, answered = [], 0
    for each in deliveries:
        is_done = each.is_done or each.request in done
        if now - each.at <= (KEPT_SECONDS if is_done else ABANDONED_SECONDS):
            kept.append(each if each.is_done is is_done else _replace(each, is_done=True))
            answered += is_done
    for _ in range(answered - MOST_KEPT):
        del kept[next(index for index, each in enumerate(kept) if each.is_done)]
    return tuple(kept)
