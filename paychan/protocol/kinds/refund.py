"""The refund: after expiry the client takes the whole funding back without the server (RBPCP §8.3)."""

from __future__ import annotations

from collections.abc import Sequence

from bitcoin.core import COutPoint as TxOutPoint
from bitcoin.core import CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from coincurve import PrivateKey
from msgspec import Struct

from paychan.protocol.kinds.script import ChannelTerms
from paychan.protocol.kinds.sighash import SIGHASH_ALL, whole_transaction_digest
from paychan.protocol.types import OutPoint, Sat

REFUND_SEQUENCE = 0xFFFFFFFD
"""BIP65: the lock time has no effect if every input's sequence is final. BIP125: a sequence below 0xfffffffe signals
that a transaction with a higher fee may replace this one. BIP68 does not apply to version 1, nor with bit 31 set."""

_CLIENT_BRANCH = b"\x00"  # OP_0 selects the ELSE branch

INPUT_BYTES = 36 + 1 + 1 + 73 + 1 + 2 + 82 + 4
"""Most bytes of one input of a refund: outpoint, length, signature, branch, script, sequence."""


class Refund(Struct, frozen=True):
    """A signed refund, valid in blocks whose median time past is later than `ChannelTerms.expiry`."""

    transaction: bytes
    txid: bytes
    fee_sat: Sat


class Coin(Struct, frozen=True):
    """An output that pays to the channel's script. The signature does not commit to its value: BIP143 is not used."""

    outpoint: OutPoint
    value_sat: Sat


def sign_refunds(
    key: PrivateKey,
    terms: ChannelTerms,
    coins: Sequence[Coin],
    refund_script: bytes,
    fee_sat: Sat,
    *,
    sequence: int = REFUND_SEQUENCE,
) -> Refund:
    """Build and sign the refund of all these outputs, less the fee in satoshi, to `refund_script`.

    Raises:
        ValueError: the fee is negative, or not below the sum of the outputs.
    """
    total_sat = sum(coin.value_sat for coin in coins)
    if not 0 <= fee_sat < total_sat:
        msg = f"fee of {fee_sat} sat does not fit a funding output of {total_sat} sat"
        raise ValueError(msg)
    prevouts = [TxOutPoint(coin.outpoint.txid, coin.outpoint.vout) for coin in coins]
    outputs = [CTxOut(total_sat - fee_sat, CScript(refund_script))]

    def transaction(script_sigs: Sequence[bytes]) -> CTransaction:
        inputs = [
            CTxIn(prevout, CScript(script_sig), sequence)
            for prevout, script_sig in zip(prevouts, script_sigs, strict=True)
        ]
        return CTransaction(inputs, outputs, nLockTime=terms.expiry, nVersion=1)

    script = terms.redeem_script
    unsigned = transaction([b""] * len(coins))
    script_sigs = []
    for index in range(len(coins)):
        digest = whole_transaction_digest(unsigned, index, script)
        signature = key.sign(digest, hasher=None) + bytes([SIGHASH_ALL])
        script_sigs.append(
            bytes([len(signature)]) + signature + _CLIENT_BRANCH + b"\x4c" + bytes([len(script)]) + script
        )
    signed = transaction(script_sigs)
    return Refund(signed.serialize(), signed.GetTxid(), fee_sat)


def refunds_at_rate(
    key: PrivateKey,
    terms: ChannelTerms,
    coins: Sequence[Coin],
    refund_script: bytes,
    sat_per_vb: int,
    *,
    sequence: int = REFUND_SEQUENCE,
) -> Refund:
    """Sign a refund at a rate in satoshi per virtual byte; its size is that of the same refund without a fee."""
    size = len(sign_refunds(key, terms, coins, refund_script, Sat(0), sequence=sequence).transaction)
    return sign_refunds(key, terms, coins, refund_script, Sat(sat_per_vb * size), sequence=sequence)


def sign_refund(
    key: PrivateKey,
    terms: ChannelTerms,
    outpoint: OutPoint,
    funding_sat: Sat,
    refund_script: bytes,
    fee_sat: Sat,
    *,
    sequence: int = REFUND_SEQUENCE,
) -> Refund:
    """Build and sign the refund of one output. Raises like `sign_refunds`."""
    return sign_refunds(key, terms, [Coin(outpoint, funding_sat)], refund_script, fee_sat, sequence=sequence)
