"""Open a channel, and pay over it.

The order is always: sign, save, send, compare, save. A payment counts as paid once it is signed, whatever the server
answers, so no later payment is smaller.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from msgspec import UNSET, Struct

from paychan.client.amounts import whole
from paychan.client.errors import (
    AmountTooSmall,
    Refused,
    TermsUnacceptable,
    Unacknowledged,
    Unreachable,
    WrongState,
    WrongValue,
)
from paychan.client.flows import close as closing
from paychan.client.flows.follow import ask_channel
from paychan.client.flows.verdict import need, refuse, result_of
from paychan.client.limits import Limits
from paychan.client.record import ChannelRecord, State
from paychan.client.spend import next_change
from paychan.client.transport import routes
from paychan.client.transport.answers import check_result, settlement_txid
from paychan.client.transport.effects import Flow, Patience, Request, Response, Save, ask
from paychan.protocol.types import Sat
from paychan.protocol.wire.rbpcp import ChannelStatus, PaymentResult

_replace = msgspec.structs.replace


class Receipt(Struct, frozen=True):
    """A payment that the server accepted; amounts in satoshi."""

    paid_sat: Sat
    total_paid_sat: Sat
    left_sat: Sat
    repeated: bool
    """The server had booked all or part of this payment before; only the answer was lost."""
    settlement_txid: str
    """Settlement, if the payment drained and so closed the channel; "" otherwise, or while it is pending."""
    application_data: str
    again_sat: Sat = Sat(0)
    """Earlier payments that the server had lost, after its operator restored a backup, and booked again with this one."""
    reopened: bool = False
    """The server had lost the channel, which was opened again with all that had been acknowledged."""
    taken_over_sat: Sat = Sat(0)
    """Earlier payments of another copy of this wallet, which this one lacked and took over; see `flows.heal`."""
    earlier: Receipt | None = None
    """The receipt of an earlier payment without an answer, which was finished before this one; None without one."""


# --- opening --------------------------------------------------------------------------------------------------------


def open_channel(record: ChannelRecord, amount_sat: int | None, limits: Limits, patience: Patience) -> Flow[Receipt]:
    """Open with a first payment (default: the open price).

    An opening payment that got no answer is sent again unchanged. Raises as `Channel.open`.
    """
    amount_sat = None if amount_sat is None else whole(amount_sat, "amount_sat")
    need(record, State.NEW)
    if not record.funding_outpoint:
        raise WrongState(name=record.name, state="not funded", need="funding")
    again = record.signed_sat is not None and not record.refused
    if not again:
        amount = record.open_price_sat if amount_sat is None else amount_sat
        if amount < record.open_price_sat:
            want = f"at least {record.open_price_sat:,}"
            raise TermsUnacceptable(what="opening payment in satoshi", got=amount, want=want)
        record = _signed(record, next_change(record, amount, limits, drain=amount == record.funding_sat))
        yield Save(record)
    elif amount_sat not in (None, record.pending_sat):
        raise Unacknowledged(pending_sat=record.pending_sat)
    paid = record.pending_sat
    reply = yield from ask(routes.open_request(record, record.sign(record.left_sat)), patience)
    if reply.response.status == 409:
        return (yield from _take_over(record, reply.response, patience))
    result = yield from result_of(record, reply.response)
    record = _replace(record, location=routes.resource(record, reply.response))
    _, receipt = yield from _acknowledge(record, result, {paid}, paid)
    return receipt


def _signed(record: ChannelRecord, change_sat: Sat, application_data: str = "") -> ChannelRecord:
    """Record the payment before it is sent. The opening payment determines the secret of a v2 channel."""
    record = _replace(record, signed_sat=change_sat, refused=False, application_data=application_data)
    if record.state is State.NEW:
        record = _replace(record, secret=routes.secret_of(record, record.sign(change_sat)))
    return record


def _take_over(record: ChannelRecord, conflict: Response, patience: Patience) -> Flow[Receipt]:
    """Continue a channel that already exists, if it accepts the opening payment again as worth 0.

    Then the answer to this opening was lost. A conflict without Location means settled earlier (RBPCP §5.2), or moved.
    """
    if not routes.located(conflict, record.url) and not record.movable:
        yield from refuse(record, conflict)
    found = _replace(record, location=routes.resource(record, conflict))
    paid = found.pending_sat
    seen = yield from ask_channel(found, _newest, patience)
    if 400 <= seen.response.status < 500:
        yield from refuse(seen.record if seen.moved else record, conflict)
    result = yield from result_of(seen.record, seen.response)
    _, receipt = yield from _acknowledge(seen.record, result, {0}, paid)
    return _replace(receipt, taken_over_sat=Sat(max(0, seen.taken_over_sat - paid)))


# --- paying ---------------------------------------------------------------------------------------------------------


def pay(
    record: ChannelRecord, amount_sat: int, limits: Limits, patience: Patience, *, drain: bool, application_data: str
) -> Flow[Receipt]:
    """Pay `amount_sat`, or with `drain` everything that is left, which closes the channel.

    An earlier payment without an answer is finished first; see `finish_earlier`.

    Raises:
        InsufficientFunds, WouldLeaveDust, WouldTakeBack, OverLimit: see `spend.next_change`.
        WrongNumber: the amount is not a whole number.
        AmountTooSmall: the amount is not positive.
        WrongValue: there is an amount beside `drain`.
    """
    amount_sat = whole(amount_sat, "amount_sat")
    record, earlier = yield from finish_earlier(record, amount_sat, limits, patience, drain=drain)
    if drain and earlier is not None and record.left_sat == 0:
        return earlier
    refused_at = record.left_sat if record.unacknowledged else None
    record = _signed(record, next_change(record, amount_sat, limits, drain=drain), application_data)
    yield Save(record)
    received = {record.pending_sat}
    if refused_at is not None:  # the server refused that payment, but may have booked it later
        received.add(Sat(refused_at - record.left_sat))
    record, receipt = yield from transfer(record, patience, received)
    taken_over = receipt.taken_over_sat
    if taken_over:  # another copy of this wallet had paid more than this payment adds up to: it was worth nothing
        record = _signed(record, next_change(record, amount_sat, limits, drain=drain), application_data)
        yield Save(record)
        _, receipt = yield from transfer(record, patience, {record.pending_sat})
    return _replace(receipt, earlier=earlier, taken_over_sat=taken_over)


def finish_earlier(
    record: ChannelRecord, amount_sat: int, limits: Limits, patience: Patience, *, drain: bool = False
) -> Flow[tuple[ChannelRecord, Receipt | None]]:
    """Send an earlier payment that got no answer again, before `amount_sat` is paid; return its receipt.

    So the application gets each payment by itself. Nothing is sent if the new amount does not fit.

    Raises:
        Refused, Unreachable: the earlier payment failed again, and nothing new was signed; the text says so.
    """
    need(record, State.OPEN)
    if drain and amount_sat:
        both = f"{amount_sat} sat and drain, which pays everything that is left"
        raise WrongValue(what="payment", got=both, want="one of them")
    if amount_sat <= 0 and not drain:
        raise AmountTooSmall(got_sat=amount_sat, need_sat=1)
    if not record.unacknowledged or record.refused:
        return record, None
    next_change(_replace(record, acknowledged_sat=record.signed_sat), amount_sat, limits, drain=drain)
    pending = record.pending_sat
    try:
        record, earlier = yield from transfer(record, patience, {pending, Sat(0)})
    except (Refused, Unreachable) as error:
        error.concerns_earlier(pending)
        raise
    if record.left_sat or not drain:
        need(record, State.OPEN)
    return record, earlier


def resume(record: ChannelRecord, patience: Patience) -> Flow[Receipt]:
    """Send the newest signed payment again. The server books it once, however often it arrives."""
    need(record, State.OPEN)
    _, receipt = yield from transfer(record, patience, {record.pending_sat, Sat(0)})
    return receipt


def transfer(
    record: ChannelRecord, patience: Patience, received: Collection[int]
) -> Flow[tuple[ChannelRecord, Receipt]]:
    """Send the newest signed payment, which is already saved; return the record after it, and its receipt.

    `received` are the values the server may report for it. If another copy of the wallet has paid more, this pays
    nothing, and the receipt has `taken_over_sat`.
    """
    paid = record.pending_sat
    seen = yield from ask_channel(record, _newest, patience)
    record = seen.record
    if seen.moved:  # the payments in the settlement were paid before
        received = {record.pending_sat}
    if seen.reopened:  # the server may have got some of it from its signer
        received = range(record.pending_sat + 1)
    if record.left_sat == 0 and seen.response.status == 410:
        return (yield from _drained_before(record, patience, paid))
    if seen.taken_over_sat:
        paid, received = Sat(0), {0}
    result = yield from result_of(record, seen.response)
    if seen.repeated and 0 not in received:
        received = {*received, 0}
    record, receipt = yield from _acknowledge(record, result, received, paid)
    return record, _replace(receipt, reopened=seen.reopened, taken_over_sat=seen.taken_over_sat)


def _newest(record: ChannelRecord) -> Request:
    return routes.pay_request(record, record.sign(record.left_sat))


def _drained_before(record: ChannelRecord, patience: Patience, paid: Sat) -> Flow[tuple[ChannelRecord, Receipt]]:
    """Ask the server to close a channel that the last payment drained, to get the settlement of a lost answer."""
    record = _replace(record, state=State.CLOSING, closing_sat=Sat(0))
    yield Save(record)
    settled = yield from closing.close(record, patience, fee_sat=0, change_address="")
    record = _replace(record, state=State.CLOSED, acknowledged_sat=Sat(0), settlement_txid=settled.settlement_txid)
    return record, Receipt(paid, record.paid_sat, Sat(0), True, settled.settlement_txid, "")


def _acknowledge(
    record: ChannelRecord, result: PaymentResult, received: Collection[int], paid: Sat
) -> Flow[tuple[ChannelRecord, Receipt]]:
    """Compare the result with the newest signed payment, then record that the server holds it."""
    drained = record.left_sat == 0
    status = ChannelStatus.CLOSED if drained else ChannelStatus.OPEN
    most_sat = record.funding_sat - record.left_sat
    check_result(result, status, {record.left_sat}, received, most_sat, record.earlier_paid_sat)
    txid = settlement_txid(result, may_wait=True) if drained else ""
    state = State.OPEN if not drained else State.CLOSED if txid else State.CLOSING
    record = _replace(record, acknowledged_sat=record.left_sat, refused=False, state=state, settlement_txid=txid)
    yield Save(record)
    said = "" if result.application_data is UNSET else result.application_data
    value = result.value_received
    again = Sat(max(0, value - paid))
    return record, Receipt(paid, record.paid_sat, record.left_sat, value < paid, txid, said, again_sat=again)
