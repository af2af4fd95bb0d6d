"""Open a channel again that the server has lost, because its operator restored a backup from before the opening.

The opening payment is the newest payment that the server acknowledged. It was signed and sent before, so nothing new is
signed, no limit of the payer is concerned, and the server gets no satoshi more than it had. A newer payment follows by
the caller's request, so that the application behind the server is asked about it. The secret of a v2 channel follows
from the opening payment, so a channel that is opened again has another one. It can be derived again at any time, so it
is saved only once the server has confirmed it: a server that answered 404 by mistake still has the earlier one.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from paychan.client.errors import ChannelUnknown, Refused, ServerFailed
from paychan.client.flows.verdict import refuse
from paychan.client.record import ChannelRecord, State
from paychan.client.transport import routes
from paychan.client.transport.answers import check_result, read_result, refusal
from paychan.client.transport.effects import Flow, Patience, Response, Save, ask
from paychan.protocol.wire.rbpcp import ChannelStatus

_replace = msgspec.structs.replace


class Reopening(Struct, frozen=True):
    """A channel that was opened again, or that may have been: the next answer with `record` shows it."""

    before: ChannelRecord
    record: ChannelRecord
    conflict: Response | None = None
    """The server has a channel at this output: this one, if the answer to an earlier attempt was lost."""


def is_lost(record: ChannelRecord, response: Response) -> bool:
    """Say whether the server does not know a channel whose payments it acknowledged, and which can be opened again.

    A channel that moved must have paid the open price at its present output. If it has not, the server may still find
    it by its own withdrawal.
    """
    if response.status != 404 or refusal(response).code not in ("", "unknown_channel"):
        return False
    under_way = record.state in (State.OPEN, State.CLOSING) and record.acknowledged_sat is not None
    return under_way and record.funding_sat - record.agreed_sat >= record.open_price_sat


def reopen(record: ChannelRecord, patience: Patience) -> Flow[Reopening]:
    """Open the channel again with its newest acknowledged payment.

    Raises:
        ChannelUnknown: the server refuses, with the reason of that refusal.
        ServerFailed, Unreachable: try again later.
        ServerMisbehaved: the answer contradicts the signed payments.
    """
    opening = record.sign(record.agreed_sat)
    there = _replace(record, secret=routes.secret_of(record, opening))
    reply = yield from ask(routes.open_request(_replace(there, location=routes.new_path(there)), opening), patience)
    there = _replace(there, location=routes.resource(there, reply.response))
    if reply.response.status == 409:
        return Reopening(record, there, reply.response)
    if reply.response.status >= 400:
        yield from _refused(record, reply.response)
    result = read_result(reply.response)
    # The server may know a newer payment by its signer.
    left = range(record.left_sat, record.agreed_sat + 1)
    status = ChannelStatus.OPEN if result.channel_value_left else ChannelStatus.CLOSED
    check_result(result, status, left, {0}, record.funding_sat - record.left_sat)
    yield Save(there)
    return Reopening(record, there)


def _refused(record: ChannelRecord, response: Response) -> Flow[None]:
    try:
        yield from refuse(record, response, newest=False)
    except ServerFailed:
        raise
    except Refused as error:
        reason = f"unknown channel, and opening it again was refused with status {error.status}: {error.reason}"
        raise ChannelUnknown(404, "unknown_channel", reason, {**error.fields, "refusal": error.code}) from error
