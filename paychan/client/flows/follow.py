"""Follow a channel that the server moved: the change of a settlement funds it again (RBPCP §6.5).

A channel that the server lost is opened again; see `reopen`. A payment that the wallet lacks is taken over; see `heal`.

The client trusts nothing. The server must show the whole settlement, with both signatures. Its first output must hold
the change of a payment that the client signed, locked by the channel's own script. Then it is as safe as the funding
that it spends, whichever peer publishes it. The location that the server names is only compared; requests go to the
payer's URL.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from coincurve import PublicKey
from msgspec import Struct

from paychan.client.coins import Source
from paychan.client.errors import ServerMisbehaved
from paychan.client.flows.heal import proven_newest, taken_over, with_closing
from paychan.client.flows.refund import first_refund
from paychan.client.flows.reopen import Reopening, is_lost, reopen
from paychan.client.flows.settlement import signed_by_us, spend_of_channel
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.answers import printable, refusal
from paychan.client.transport.effects import MOVED, Flow, Patience, Request, Response, Save, ask, is_busy
from paychan.client.transport.routes import located
from paychan.protocol.kinds.base import SIGHASH_ALL
from paychan.protocol.payment import encoding_problem
from paychan.protocol.tx import UnsignedTransaction
from paychan.protocol.types import OutPoint, Sat

_MOST_MOVES = 3
"""A higher number within one request would only keep the client busy: each move takes a payment and some blocks."""

_replace = msgspec.structs.replace


class Arrival(Struct, frozen=True):
    """The answer at the channel's present output, and the record at that output."""

    record: ChannelRecord
    response: Response
    repeated: bool
    """The server may have seen the request more than once."""
    moved: bool
    reopened: bool
    """The server had lost the channel; it was opened again."""
    taken_over_sat: Sat = Sat(0)
    """Payments that another copy of this wallet made, and that this one took over."""


def ask_channel(
    record: ChannelRecord,
    make: Callable[[ChannelRecord], Request],
    patience: Patience,
    busy: Callable[[Response], bool] = is_busy,
) -> Flow[Arrival]:
    """Send the request that `make` builds. If the channel has moved, save that, with a refund, and ask again there.

    If the server has lost the channel, open it again, save that, and ask again. If the server proves a payment that the
    wallet lacks, save that, and ask once more.

    Raises:
        Unreachable: see `ask`.
        ChannelUnknown: the server has lost the channel and does not open it again.
        ServerMisbehaved: the move is not proven.
        Refused: the server cannot show the settlement at the moment.
    """
    repeated, moves, other_copy = False, 0, Sat(0)
    again: Reopening | None = None
    while True:
        reply = yield from ask(
            make(record), patience, busy=lambda response: busy(response) or _unproven(response), follows=record.movable
        )
        repeated = repeated or reply.repeated
        if again is None and is_lost(record, reply.response):
            again = yield from reopen(record, patience)
            record = again.record
            continue
        if again is not None and again.conflict is not None:
            if reply.response.status == 404:  # the channel that is there is another one
                return Arrival(again.before, again.conflict, repeated, moves > 0, reopened=False)
            if not is_busy(reply.response):
                yield Save(record)
        if not other_copy and (newest := proven_newest(record, reply.response)) is not None:
            other_copy = Sat(record.agreed_sat - newest)
            record = taken_over(record, newest)
            yield Save(record)
            continue
        if reply.response.status not in MOVED:
            return Arrival(record, reply.response, repeated, moves > 0, again is not None, other_copy)
        if _unproven(reply.response):
            raise refusal(reply.response)
        if moves == _MOST_MOVES:
            raise ServerMisbehaved(what="moves during one request", got=moves + 1, want=f"at most {moves}")
        record = moved(record, reply.response)
        yield Save(record)
        moves += 1


def _unproven(response: Response) -> bool:
    """A server that cannot query its chain at the moment reports a move without its proof."""
    return response.status in MOVED and not _shown(response)


def _shown(response: Response) -> str:
    try:
        text = json.loads(response.body)["transaction"]
    except (ValueError, RecursionError, TypeError, LookupError):
        return ""
    return text if isinstance(text, str) else ""


def moved(record: ChannelRecord, response: Response) -> ChannelRecord:
    """Return the record at the output that the answer proves, with a refund of that output.

    A payment that is not in the settlement still counts as paid; the caller signs it again for the new output. One that
    another copy of this wallet made is in the settlement, and is taken over from it.

    Raises:
        ServerMisbehaved: the answer does not prove a move.
    """
    text = _shown(response)
    transaction = _read(text)
    outpoint, value = OutPoint(transaction.GetTxid(), 0), Sat(transaction.vout[0].nValue)
    _check_location(record, response, outpoint)
    _check_settlement(record, transaction, value)
    there = _replace(
        record,
        funding_outpoint=str(outpoint),
        funding_sat=value,
        earlier_paid_sat=Sat(record.earlier_paid_sat + record.funding_sat - value),
        acknowledged_sat=value,
        signed_sat=min(record.left_sat, value),
        refused=record.refused and record.left_sat < value,
        state=State.OPEN if record.state is State.NEW else record.state,
        moves=(*record.moves, text),
        funding_source=Source.TRANSACTION,
        deposits=tuple(each for each in record.deposits if each.outpoint != str(outpoint)),
    )
    if record.closing_sat is not None:
        there = with_closing(there, Sat(record.agreed_sat - record.closing_sat))
    return _replace(there, refunds=(*record.refunds, *first_refund(there)))


# --- checks of a move -----------------------------------------------------------------------------------------------


def _read(text: str) -> CTransaction:
    try:
        transaction = CTransaction.deserialize(bytes.fromhex(text))
    except (SerializationError, ValueError) as error:
        got = printable(str(error) or type(error).__name__)[:120]
        raise ServerMisbehaved(what="transaction that moved the channel", got=got, want="hex") from None
    if not transaction.vin or not transaction.vout:
        raise ServerMisbehaved(what="transaction that moved the channel", got="nothing in it", want="a settlement")
    return transaction


def _check_location(record: ChannelRecord, response: Response, outpoint: OutPoint) -> None:
    got = urlsplit(located(response, record.url)).path
    want = [f"/v2/channels/{name.txid_hex}/{name.vout}" for name in (outpoint, outpoint.reversed)]
    if got not in want:
        raise ServerMisbehaved(what="place that the channel moved to", got=printable(got) or "none", want=want[0])


def _check_settlement(record: ChannelRecord, transaction: CTransaction, value: Sat) -> None:
    spent = transaction.vin[0].prevout
    if (bytes(spent.hash), int(spent.n)) != (record.outpoint.txid, record.outpoint.vout):
        got = f"{OutPoint(bytes(spent.hash), int(spent.n))}"
        raise ServerMisbehaved(what="output that the move spends", got=got, want=record.funding_outpoint)
    script = bytes(transaction.vout[0].scriptPubKey)
    if script != record.terms.funding_script:
        raise ServerMisbehaved(
            what="script that the channel moved to", got=script.hex()[:70], want=record.terms.funding_script.hex()
        )
    if not 0 < value <= record.agreed_sat:
        want = f"1 to {record.agreed_sat:,}"
        raise ServerMisbehaved(what="value that the channel moved with", got=value, want=want)
    if not signed_by_us(record, transaction, 0, value, script):
        raise ServerMisbehaved(what="payment in the move", got=f"change of {value} sat", want="a signed payment")
    if not _signed_by_server(record, transaction):
        raise ServerMisbehaved(what="move", got="no signature of the server", want="its signature")


def _signed_by_server(record: ChannelRecord, transaction: CTransaction) -> bool:
    """Check the server's signature of a transaction of that layout."""
    signature = spend_of_channel(record, transaction, 0).server_signature
    if signature[-1:] != bytes([SIGHASH_ALL]) or encoding_problem(signature[:-1]) is not None:
        return False
    unsigned = UnsignedTransaction.read(transaction)
    digest = record.terms.kind.settlement_digest(unsigned, 0, record.terms, record.funding_sat)
    return PublicKey(record.terms.server_key).verify(signature[:-1], digest, hasher=None)
