"""Going along with a channel that the server moved: the change of a settlement funds it again (RBPCP §6.5).

Nothing is believed. The settlement must be there in full, signed by both sides, and its first output must hold what a
payment of ours left, locked by the channel's own script: then it is as good as the funding that it spends, whoever
publishes it. Where the server points is only compared; requests go to the URL that the payer chose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from bitcoin.core import CTransaction
from bitcoin.core.script import CScript, CScriptInvalidError
from bitcoin.core.serialize import SerializationError
from coincurve import PublicKey
from msgspec import Struct

from paychan.client.coins import Source
from paychan.client.errors import ServerMisbehaved
from paychan.client.flows.refund import first_refund
from paychan.client.record import ChannelRecord, State
from paychan.client.transport.answers import printable, refusal
from paychan.client.transport.effects import MOVED, Flow, Patience, Request, Response, Save, ask, is_busy
from paychan.client.transport.routes import located
from paychan.protocol.kinds.sighash import SIGHASH_ALL, SINGLE_ANYONECANPAY, whole_transaction_digest
from paychan.protocol.payment import Payment, PaymentVerifier, encoding_problem
from paychan.protocol.tx import FINAL_SEQUENCE
from paychan.protocol.types import OutPoint, Sat

_MOST_MOVES = 3
"""More in the time of one request would only keep us busy: each takes a payment and some blocks."""

_replace = msgspec.structs.replace


class Arrival(Struct, frozen=True):
    """The answer that a request got where the channel is, and the record as it is there."""

    record: ChannelRecord
    response: Response
    repeated: bool
    """The server may have seen the request more than once."""
    moved: bool


def ask_channel(
    record: ChannelRecord,
    make: Callable[[ChannelRecord], Request],
    patience: Patience,
    busy: Callable[[Response], bool] = is_busy,
) -> Flow[Arrival]:
    """Ask the channel; if it has moved, note that, with a refund, and ask there what `make` signs for the new output.

    Raises:
        Unreachable: see `ask`.
        ServerMisbehaved: it did not move like that.
        Refused: the server can't show the settlement at the moment.
    """
    repeated, moves = False, 0
    while True:
        reply = yield from ask(
            make(record), patience, busy=lambda response: busy(response) or _unproven(response), follows=record.movable
        )
        repeated = repeated or reply.repeated
        if reply.response.status not in MOVED:
            return Arrival(record, reply.response, repeated, moves > 0)
        if _unproven(reply.response):
            raise refusal(reply.response)
        if moves == _MOST_MOVES:
            raise ServerMisbehaved(what="moves during one request", got=moves + 1, want=f"at most {moves}")
        record = moved(record, reply.response)
        yield Save(record)
        moves += 1


def _unproven(response: Response) -> bool:
    """A server that can't ask its chain at the moment moves the channel without showing how."""
    return response.status in MOVED and not _shown(response)


def _shown(response: Response) -> str:
    try:
        text = json.loads(response.body)["transaction"]
    except (ValueError, RecursionError, TypeError, LookupError):
        return ""
    return text if isinstance(text, str) else ""


def moved(record: ChannelRecord, response: Response) -> ChannelRecord:
    """Return the record at the output that the answer proves, with a refund of that.

    A payment that is not in the settlement still counts as given away, and is signed again by whoever sends it.

    Raises:
        ServerMisbehaved: it proves nothing of the kind.
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
        signed_sat=record.left_sat,
        refused=record.refused and record.left_sat != value,
        state=State.OPEN if record.state is State.NEW else record.state,
        moves=(*record.moves, text),
        funding_source=Source.TRANSACTION,
        deposits=tuple(each for each in record.deposits if each.outpoint != str(outpoint)),
    )
    if record.closing_sat is not None:
        there = _with_closing(there, Sat(record.agreed_sat - record.closing_sat))
    return _replace(there, refunds=(*record.refunds, *first_refund(there)))


def _with_closing(there: ChannelRecord, fee: Sat) -> ChannelRecord:
    """Offer the fee that was offered, if what is left has room for it."""
    closing = there.funding_sat - fee
    if closing < 0 or 0 < closing < there.dust_sat:
        closing = there.funding_sat
    return _replace(there, closing_sat=Sat(closing), signed_sat=min(there.left_sat, Sat(closing)))


# --- what is checked ------------------------------------------------------------------------------------------------


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
    if not record.left_sat <= value <= record.agreed_sat:
        want = f"{record.left_sat} to {record.agreed_sat}"
        raise ServerMisbehaved(what="value that the channel moved with", got=value, want=want)
    if not _signed_by_us(record, transaction, value):
        raise ServerMisbehaved(what="payment in the move", got=f"change of {value} sat", want="one that we signed")
    if not _signed_by_server(record, transaction):
        raise ServerMisbehaved(what="move", got="no signature of the server's", want="its signature")


def _signed_by_us(record: ChannelRecord, transaction: CTransaction, value: Sat) -> bool:
    """A payment's signature holds in transactions of this layout alone (RBPCP §3)."""
    layout = (transaction.nVersion, transaction.nLockTime, transaction.vin[0].nSequence)
    ours, _ = _signatures(record, transaction)
    if layout != (1, 0, FINAL_SEQUENCE) or ours[-1:] != bytes([SINGLE_ANYONECANPAY]):
        return False
    verifier = PaymentVerifier(record.terms, record.outpoint, record.terms.funding_script)
    return verifier.problem(Payment(value, ours[:-1], SINGLE_ANYONECANPAY)) is None


def _signed_by_server(record: ChannelRecord, transaction: CTransaction) -> bool:
    _, theirs = _signatures(record, transaction)
    if theirs[-1:] != bytes([SIGHASH_ALL]) or encoding_problem(theirs[:-1]) is not None:
        return False
    digest = whole_transaction_digest(transaction, 0, record.terms.redeem_script)
    return PublicKey(record.terms.server_key).verify(theirs[:-1], digest, hasher=None)


def _signatures(record: ChannelRecord, transaction: CTransaction) -> tuple[bytes, bytes]:
    """Read `<client sig> <server sig> <selector> <redeem script>`; empty ones if it is anything else."""
    try:
        pushed = [data for _, data, _ in CScript(transaction.vin[0].scriptSig).raw_iter()]
    except CScriptInvalidError:
        return b"", b""
    if len(pushed) != 4 or pushed[3] != record.terms.redeem_script:
        return b"", b""
    return pushed[0] or b"", pushed[1] or b""
