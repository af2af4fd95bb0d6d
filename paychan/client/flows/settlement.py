"""Read the settlement that the server shows: it must pay the payer's change, and names the fee that it pays.

A wallet that is an old copy may expect more change than the newest payment left. The settlement holds the payer's own
signature, so it proves that payment, and the wallet takes it over.
"""

from __future__ import annotations

import msgspec
from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from msgspec import UNSET

from paychan.client.errors import ServerMisbehaved
from paychan.client.record import ChannelRecord
from paychan.client.transport.answers import printable
from paychan.protocol.address import decode_address, encode_address
from paychan.protocol.kinds.base import Spend
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.tx import FINAL_SEQUENCE, unlockings_of
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.rbpcp import PaymentResult

_replace = msgspec.structs.replace


def read_settlement(record: ChannelRecord, result: PaymentResult) -> tuple[ChannelRecord, Sat | None]:
    """Return the record with the change that was settled, and the fee in satoshi.

    The fee is None if the server shows no settlement, or one of several channels.

    Raises:
        ServerMisbehaved: not a settlement of this channel, or it pays less change than any payment that this key signed.
    """
    text = result.settlement_transaction
    if text is UNSET or not text:
        return record, None
    try:
        transaction = CTransaction.deserialize(bytes.fromhex(text))
    except (SerializationError, ValueError) as error:
        raise ServerMisbehaved(what="settlement", got=printable(error)[:100], want="a transaction") from None
    txid = transaction.GetTxid()[::-1].hex()
    if txid != result.settlement_txid:
        raise ServerMisbehaved(what="txid of the settlement", got=printable(result.settlement_txid), want=txid)
    spent = [OutPoint(bytes(each.prevout.hash), int(each.prevout.n)) for each in transaction.vin]
    if record.outpoint not in spent:
        raise ServerMisbehaved(
            what="settlement", got="a spend of another output", want=f"one that spends {record.outpoint}"
        )
    record = _with_change(record, transaction, spent.index(record.outpoint))
    fee_sat = Sat(record.funding_sat - sum(each.nValue for each in transaction.vout))
    return record, fee_sat if len(spent) == 1 else None


def _with_change(record: ChannelRecord, transaction: CTransaction, index: int) -> ChannelRecord:
    """Compare the change with the closing payment; take it over if this key signed for less."""
    change_sat = record.closing_sat or Sat(0)
    # The server may have settled to the channel's change address before this closing named another one.
    addresses = {record.closing_address or record.change_address, record.change_address}
    scripts = {decode_address(address, record.network) for address in addresses}
    there = [(Sat(each.nValue), bytes(each.scriptPubKey)) for each in transaction.vout][index : index + 1]
    if not change_sat or any(value >= change_sat and paid_to in scripts for value, paid_to in there):
        return record
    for value, script in (*there, (Sat(0), b"")):
        if value < change_sat and signed_by_us(record, transaction, index, value, script):
            address = encode_address(script, record.network) if value else ""
            return _replace(
                record, closing_sat=value, closing_address=address, acknowledged_sat=value, signed_sat=value
            )
    raise ServerMisbehaved(what="change in the settlement", got=there or "none", want=change_sat)


def signed_by_us(record: ChannelRecord, transaction: CTransaction, index: int, value: Sat, script: bytes) -> bool:
    """Say whether an input holds this key's signature of a payment that leaves `value` to `script`.

    A payment's signature is valid in transactions of this layout only (RBPCP §3).
    """
    layout = (transaction.nVersion, transaction.nLockTime, transaction.vin[index].nSequence)
    signature = spend_of_channel(record, transaction, index).client_signature
    if layout != (1, 0, FINAL_SEQUENCE) or not signature:
        return False
    verifier = PaymentVerifier(record.terms, record.outpoint, record.funding_sat, script)
    return verifier.problem(Payment(value, signature[:-1], signature[-1])) is None


def spend_of_channel(record: ChannelRecord, transaction: CTransaction, index: int) -> Spend:
    """Read an input; without signatures if it does not spend an output of this channel by the server's branch."""
    spend = record.terms.kind.recognise(unlockings_of(transaction)[index])
    if spend is None or spend.script != record.terms.redeem_script:
        return Spend(by_server=False, script=b"")
    return spend
