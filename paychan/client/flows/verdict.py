"""Apply an answer to a channel: return a success to compare, or save the effect of a refusal and raise it."""

from __future__ import annotations

from typing import NoReturn

import msgspec

from paychan.client.errors import ChannelGone, ChannelUnknown, PaymentPending, ServerFailed, WrongState
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.answers import TXID, read_result, refusal
from paychan.client.transport.effects import Flow, Response, Save
from paychan.protocol.wire.rbpcp import PaymentResult

_replace = msgspec.structs.replace


def need(record: ChannelRecord, state: State) -> None:
    if record.state is not state:
        raise WrongState(name=record.name, state=record.state.value, need=state.value)


def result_of(record: ChannelRecord, response: Response, *, newest: bool = True) -> Flow[PaymentResult]:
    """Read a success; or save the effect of a refusal and raise it (see `refuse`)."""
    if response.status >= 400:
        yield from refuse(record, response, newest=newest)
    return read_result(response)


def refuse(record: ChannelRecord, response: Response, *, newest: bool = True) -> Flow[NoReturn]:
    """Save the effect of a refusal, then raise it. An answer of a busy server (429, 5xx) changes nothing.

    `newest`: the request held the newest signed payment. Else that payment was not refused: a pending one stays
    pending, so that the next payment finishes it first. So it is if the server does not know the channel. A closing
    payment is never finished as another payment, so it counts as refused.
    """
    error = refusal(response)
    if isinstance(error, PaymentPending) and record.pending_sat:
        error.kept(record.pending_sat)
    if isinstance(error, ChannelGone):
        yield Save(_gone(record, error))
    elif not isinstance(error, ServerFailed):
        reopened = State.OPEN if record.closing_sat is not None else record.state
        judged = newest and (record.state is State.NEW or not isinstance(error, ChannelUnknown))
        refused = record.unacknowledged and (judged or record.refused or is_closing(record))
        yield Save(_replace(record, refused=refused, state=reopened, closing_sat=None, closing_address=""))
    raise error


def is_closing(record: ChannelRecord) -> bool:
    """Say whether the newest signed payment is that of a closing, whose fee counts as paid."""
    return record.closing_sat == record.left_sat


def gone_record(record: ChannelRecord, response: Response) -> ChannelRecord | None:
    """Return the record that a 410 leaves, if it says how the channel ended or ends; else None."""
    error = refusal(response)
    if not isinstance(error, ChannelGone):
        return None
    now = _gone(record, error)
    return now if now.ended or error.code == "channel_closing" else None


def _gone(record: ChannelRecord, error: ChannelGone) -> ChannelRecord:
    """Return the record of a channel that takes no more payments, with its settlement if the server names one."""
    txid = str(error.fields.get("txid", ""))
    if error.code in ("channel_closed", "channel_lost") and TXID.fullmatch(txid):
        return _replace(record, state=State.CLOSED, settlement_txid=txid)
    return _replace(record, state=State.CLOSING) if error.code == "channel_closing" else record


def holds_pending(record: ChannelRecord, response: Response) -> bool:
    """Say whether the server holds the payment that got no answer. Then the earlier payment is no longer the newest.

    A server without error codes answers 400 to an already acknowledged payment only in this case.
    """
    if response.status != 400 or not record.unacknowledged:
        return False
    error = refusal(response)
    newest = error.fields.get("need_sat") == record.signed_sat
    return not error.code or (error.code in ("value_backwards", "not_newest_payment") and newest)
