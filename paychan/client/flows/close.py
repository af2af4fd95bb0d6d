"""Close a channel, and ask for its status."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec
from msgspec import Struct

from paychan.client.amounts import whole
from paychan.client.errors import (
    FeeTooHigh,
    InsufficientFunds,
    PaymentPending,
    Refused,
    TermsUnacceptable,
    Unreachable,
    WouldLeaveDust,
    WrongState,
)
from paychan.client.flows.follow import ask_channel
from paychan.client.flows.settlement import read_settlement
from paychan.client.flows.verdict import gone_record, holds_pending, is_closing, result_of
from paychan.client.record import ChannelRecord, State
from paychan.client.transport import routes
from paychan.client.transport.answers import check_result, read_result, refusal, settlement_txid
from paychan.client.transport.effects import Flow, Patience, Request, Response, Save, is_busy
from paychan.protocol.address import decode_address
from paychan.protocol.types import Sat
from paychan.protocol.wire.rbpcp import ChannelStatus, PaymentResult

_replace = msgspec.structs.replace


_SETTLEMENT_BYTES = 340
"""Approximate size of a settlement of one channel with change."""

_MOST_PERCENT = 10
_MOST_SAT_PER_VB = 100
_LEAST_SAT_PER_VB = 2
"""An offered fee is a payment to the server, which should spend it as fee.

Above this limit the caller must confirm it.
"""


Watcher: TypeAlias = Callable[[str], None]


class Settled(Struct, frozen=True):
    """A closed channel. Its settlement spends `outpoint` and pays `change_sat` to `change_address`.

    The txid is the server's claim. A relaying node can change the txid of such a transaction, but not its outputs.
    """

    settlement_txid: str
    outpoint: str
    change_sat: Sat
    change_address: str
    offered_fee_sat: Sat = Sat(0)
    paid_fee_sat: Sat | None = None
    """Fee of the settlement, read from it; None if the server showed none, or settled several channels in one."""
    before: bool = False
    """The channel had ended before this request: the server closed it by itself, or an earlier request did."""


def most_fee_sat(left_sat: Sat) -> Sat:
    """Return the highest fee (satoshi) that a closing may offer without the caller's confirmation."""
    most = min(left_sat * _MOST_PERCENT // 100, _SETTLEMENT_BYTES * _MOST_SAT_PER_VB)
    return Sat(max(most, _SETTLEMENT_BYTES * _LEAST_SAT_PER_VB))


def probe(record: ChannelRecord, patience: Patience) -> Flow[ChannelRecord]:
    """Ask for the channel's status, by sending the newest acknowledged payment again; that pays nothing.

    The answer also says whether a payment that got no answer was booked. If not, it was not refused either: it stays
    pending, and the next payment finishes it first. So it is while the application has not answered for it. A channel
    that the server has closed, or is closing, is recorded as such.
    Returns the updated record.
    """
    if record.ended or record.acknowledged_sat is None:
        return record
    seen = yield from ask_channel(record, _agreed, patience, busy=_is_busy_but_tells)
    record = seen.record
    if (gone := gone_record(record, seen.response)) is not None:
        yield Save(gone)
        return (yield from _with_settlement(gone, patience))
    waits = isinstance(refusal(seen.response), PaymentPending) and record.unacknowledged
    booked = holds_pending(record, seen.response)
    if not booked and not waits:
        result = yield from result_of(record, seen.response, newest=False)
        most = record.funding_sat - record.agreed_sat
        check_result(result, ChannelStatus.OPEN, {record.agreed_sat}, {0}, most)
    acknowledged = record.signed_sat if booked else record.acknowledged_sat
    now = _replace(
        record,
        state=State.OPEN,
        acknowledged_sat=acknowledged,
        refused=(record.refused or is_closing(record)) and acknowledged != record.signed_sat and not waits,
        closing_sat=None,
        closing_address="",
    )
    if now != record:
        yield Save(now)
    return now


def _is_busy_but_tells(response: Response) -> bool:
    """A server whose application has not answered for a payment has told the status all the same."""
    return is_busy(response) and not isinstance(refusal(response), PaymentPending)


def _agreed(record: ChannelRecord) -> Request:
    return routes.pay_request(_replace(record, application_data=""), record.sign(record.agreed_sat))


def close(
    record: ChannelRecord,
    patience: Patience,
    *,
    fee_sat: int,
    change_address: str,
    max_fee_sat: int | None = None,
    waits: Watcher | None = None,
) -> Flow[Settled]:
    """Ask the server to settle the channel. In version 2 the closing may pay `fee_sat` and name a change address.

    The change of a movable channel goes to its home address, since it would otherwise fund the channel again and stay
    locked until the expiry. A closing that got no answer is sent again unchanged. If the server shows the settlement,
    it must pay the change. `waits` is called with the server's code each time that it has no settlement yet.

    Raises:
        FeeTooHigh: `fee_sat` is above `max_fee_sat`, or without that above `most_fee_sat`.
        WrongState: the channel is not open.
        TermsUnacceptable: version 1 takes neither fee nor address.
        InsufficientFunds, WouldLeaveDust: the fee does not fit the change.
        WrongNumber, ServerMisbehaved, Refused, Unreachable: see `paychan.client.errors`.
    """
    fee_sat = whole(fee_sat, "fee_sat")
    max_fee_sat = None if max_fee_sat is None else whole(max_fee_sat, "max_fee_sat")
    if record.version == 1 and (fee_sat or change_address):
        raise TermsUnacceptable(what="closing", got="a fee or an address", want="neither in protocol version 1")
    if record.state is State.CLOSED:
        return settled((yield from _with_settlement(record, patience)), before=True)
    if record.state in (State.NEW, State.REFUNDED):
        raise WrongState(name=record.name, state=record.state.value, need=State.OPEN.value)
    if record.closing_sat is None:
        _check_fee(record, fee_sat, max_fee_sat)
        record = _closing(record, fee_sat, change_address or (record.home_address if record.movable else ""))
        yield Save(record)
    record, response = yield from _ask_to_close(record, patience, waits)
    if record.left_sat < (record.closing_sat or 0) and holds_pending(record, response):
        fee = record.agreed_sat - (record.closing_sat or 0)
        record = _closing(_replace(record, acknowledged_sat=record.signed_sat), fee, record.closing_address)
        yield Save(record)
        record, response = yield from _ask_to_close(record, patience, waits)
    gone = gone_record(record, response)
    if gone is not None and gone.ended:
        yield Save(gone)
        return settled(gone, before=True)
    result = yield from result_of(record, response, newest=False)
    closing_sat = record.closing_sat or Sat(0)
    # RBPCP §6.4: v2 reports 0 left in the channel, v1 reports the change.
    check_result(result, ChannelStatus.CLOSED, {closing_sat} if record.version == 1 else {closing_sat, 0}, {0})
    record = _closed(record, result)
    yield Save(record)
    return settled(record)


def _with_settlement(record: ChannelRecord, patience: Patience) -> Flow[ChannelRecord]:
    """Ask for the settlement of a channel that the payer did not close from this wallet; take over change and fee.

    Another copy of the wallet may have paid more, or closed to another address. Without an answer, nothing changes.

    Raises:
        ServerMisbehaved: the settlement pays less change than any payment that this key signed.
    """
    if record.state is not State.CLOSED or record.closing_sat is not None or record.end_seen:
        return record
    try:
        seen = yield from ask_channel(_replace(record, closing_sat=record.agreed_sat), _last, patience)
    except (Refused, Unreachable):
        return record
    if seen.response.status not in (200, 202):
        return record
    there, paid = read_settlement(seen.record, read_result(seen.response))
    there = _replace(there, paid_fee_sat=paid)
    yield Save(there)
    return there


def _ask_to_close(
    record: ChannelRecord, patience: Patience, waits: Watcher | None
) -> Flow[tuple[ChannelRecord, Response]]:
    def is_settling(response: Response) -> bool:
        settling = _is_settling(response)
        if settling and waits is not None:
            waits(refusal(response).code)
        return settling

    seen = yield from ask_channel(record, _last, patience, busy=is_settling)
    return seen.record, seen.response


def _last(record: ChannelRecord) -> Request:
    return routes.close_request(record, record.sign(record.closing_sat or Sat(0), record.closing_address))


def settled(record: ChannelRecord, *, before: bool = False) -> Settled:
    """Return the settlement of a closed channel, as far as the record has it; `before`: it ended before this request."""
    address = record.closing_address or record.change_address
    return Settled(
        record.settlement_txid,
        record.funding_outpoint,
        record.left_sat,
        address,
        record.offered_fee_sat,
        record.paid_fee_sat,
        before,
    )


def _closing(record: ChannelRecord, fee_sat: int, change_address: str) -> ChannelRecord:
    """Record the closing payment before it is sent; its fee counts as paid."""
    change = record.agreed_sat - fee_sat
    if fee_sat < 0 or change < 0:
        raise InsufficientFunds(want_sat=fee_sat, left_sat=record.agreed_sat)
    if 0 < change < record.dust_sat:
        most = max(0, record.agreed_sat - record.dust_sat)
        raise WouldLeaveDust(change_sat=change, dust_sat=record.dust_sat, most_sat=most)
    if change_address:
        decode_address(change_address, record.network)
    return _replace(
        record,
        state=State.CLOSING,
        closing_sat=Sat(change),
        closing_address=change_address,
        signed_sat=min(record.left_sat, Sat(change)),
    )


def _closed(record: ChannelRecord, result: PaymentResult) -> ChannelRecord:
    """Return the record of a channel that the answer says is settled. Raises `ServerMisbehaved`."""
    record, paid = read_settlement(record, result)
    closing_sat = record.closing_sat or Sat(0)
    offered = Sat(record.agreed_sat - closing_sat)
    return _replace(
        record,
        state=State.CLOSED,
        signed_sat=closing_sat,
        acknowledged_sat=closing_sat,
        refused=False,
        settlement_txid=settlement_txid(result),
        offered_fee_sat=offered,
        paid_fee_sat=paid,
    )


def _check_fee(record: ChannelRecord, fee_sat: int, max_fee_sat: int | None) -> None:
    """Check a fee to offer. Raises `FeeTooHigh`."""
    most_sat = most_fee_sat(record.agreed_sat) if max_fee_sat is None else max_fee_sat
    if fee_sat > most_sat:
        rule = f"{_MOST_PERCENT} % of {record.agreed_sat} sat, and {_MOST_SAT_PER_VB} sat per byte"
        raise FeeTooHigh(got_sat=fee_sat, most_sat=most_sat, rule=rule if max_fee_sat is None else "your own limit")


def _is_settling(response: Response) -> bool:
    """A closing channel answers 410 until the server has its settlement (RBPCP §5.4): ask again later."""
    return is_busy(response) or (response.status == 410 and refusal(response).code in ("", "channel_closing"))
