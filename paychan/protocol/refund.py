"""The refund: how the client takes everything back after expiry, without the server (PROTOCOL §8.3)."""

from __future__ import annotations

from bitcoin.core import COutPoint as TxOutPoint
from bitcoin.core import CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from coincurve import PrivateKey
from msgspec import Struct

from paychan.protocol.scripts import ChannelTerms
from paychan.protocol.sighash import SIGHASH_ALL, whole_transaction_digest
from paychan.protocol.types import OutPoint, Sat

REFUND_SEQUENCE = 0xFFFFFFFE
"""BIP65: the lock time is off when every input's sequence is final, so it is one less."""

_CLIENT_BRANCH = b"\x00"  # OP_0 selects the ELSE branch


class Refund(Struct, frozen=True):
    """A signed refund, valid in blocks whose median time past is later than `ChannelTerms.expiry`."""

    transaction: bytes
    txid: bytes
    fee_sat: Sat


def sign_refund(
    key: PrivateKey, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, refund_script: bytes, fee_sat: Sat
) -> Refund:
    """Build and sign the refund of the whole funding output, less the fee, to `refund_script`.

    Raises:
        ValueError: the fee is negative or leaves nothing.
    """
    if not 0 <= fee_sat < funding_sat:
        msg = f"fee of {fee_sat} sat does not fit a funding output of {funding_sat} sat"
        raise ValueError(msg)
    prevout = TxOutPoint(outpoint.txid, outpoint.vout)
    outputs = [CTxOut(funding_sat - fee_sat, CScript(refund_script))]

    def transaction(script_sig: bytes) -> CTransaction:
        inputs = [CTxIn(prevout, CScript(script_sig), REFUND_SEQUENCE)]
        return CTransaction(inputs, outputs, nLockTime=terms.expiry, nVersion=1)

    script = terms.redeem_script
    digest = whole_transaction_digest(transaction(b""), 0, script)
    signature = key.sign(digest, hasher=None) + bytes([SIGHASH_ALL])
    signed = transaction(bytes([len(signature)]) + signature + _CLIENT_BRANCH + b"\x4c" + bytes([len(script)]) + script)
    return Refund(signed.serialize(), signed.GetTxid(), fee_sat)


def refund_at_rate(
    key: PrivateKey, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, refund_script: bytes, sat_per_vb: int
) -> Refund:
    """Sign a refund whose fee is the rate times the size of the same refund without a fee."""
    size = len(sign_refund(key, terms, outpoint, funding_sat, refund_script, Sat(0)).transaction)
    return sign_refund(key, terms, outpoint, funding_sat, refund_script, Sat(sat_per_vb * size))
