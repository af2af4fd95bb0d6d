"""What an answer means for a channel: a success to compare, or a refusal to keep and then raise."""

from __future__ import annotations

from typing import NoReturn

import msgspec

from paychan.client.errors import ChannelGone, ServerFailed, WrongState
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.answers import TXID, read_result, refusal
from paychan.client.transport.effects import Flow, Response, Save
from paychan.protocol.wire.rbpcp import PaymentResult

_replace = msgspec.structs.replace


def need(record: ChannelRecord, state: State) -> None:
    if record.state is not state:
        raise WrongState(name=record.name, state=record.state.value, need=state.value)


def result_of(record: ChannelRecord, response: Response) -> Flow[PaymentResult]:
    """Read a success, or keep what a refusal means for the channel and raise it."""
    if response.status >= 400:
        yield from refuse(record, response)
    return read_result(response)


def refuse(record: ChannelRecord, response: Response) -> Flow[NoReturn]:
    """Keep what the refusal means, then raise it. A busy server (429, 5xx) has decided nothing."""
    error = refusal(response)
    if isinstance(error, ChannelGone):
        yield Save(_gone(record, error))
    elif not isinstance(error, ServerFailed):
        reopened = State.OPEN if record.closing_sat is not None else record.state
        yield Save(
            _replace(record, refused=record.unacknowledged, state=reopened, closing_sat=None, closing_address="")
        )
    raise error


def _gone(record: ChannelRecord, error: ChannelGone) -> ChannelRecord:
    """A channel that takes no more payments, and how it ended if the server says so."""
    txid = str(error.fields.get("txid", ""))
    if error.code in ("channel_closed", "channel_lost") and TXID.fullmatch(txid):
        return _replace(record, state=State.CLOSED, settlement_txid=txid)
    return _replace(record, state=State.CLOSING) if error.code == "channel_closing" else record


def holds_pending(record: ChannelRecord, response: Response) -> bool:
    """Say whether the server holds the payment whose answer we lack: then the one before it is not the newest.

    A server that gives no codes can hardly mean anything else by a 400 to a payment it acknowledged.
    """
    if response.status != 400 or not record.unacknowledged:
        return False
    error = refusal(response)
    newest = error.fields.get("need_sat") == record.signed_sat
    return not error.code or (error.code in ("value_backwards", "not_newest_payment") and newest)
