"""The refund: after expiry the client takes the whole funding back without the server (RBPCP §8.3)."""

from __future__ import annotations

from collections.abc import Sequence

from coincurve import PrivateKey
from msgspec import Struct

from paychan.protocol.kinds.base import LARGEST_SIGNATURE, ChannelTerms
from paychan.protocol.tx import UnsignedTransaction, input_weight, virtual_size
from paychan.protocol.types import OutPoint, Sat

REFUND_SEQUENCE = 0xFFFFFFFD
"""BIP65: the lock time has no effect if every input's sequence is final. BIP125: a sequence below 0xfffffffe signals
that a transaction with a higher fee may replace this one. BIP68 does not apply to version 1, nor with bit 31 set."""


class Refund(Struct, frozen=True):
    """A signed refund, valid in blocks whose median time past is later than `ChannelTerms.expiry`."""

    transaction: bytes
    txid: bytes
    fee_sat: Sat

    @property
    def size(self) -> int:
        """Size in virtual bytes."""
        return virtual_size(self.transaction)


class Coin(Struct, frozen=True):
    """An output that pays to the channel's script."""

    outpoint: OutPoint
    value_sat: Sat


def input_size(terms: ChannelTerms) -> int:
    """Largest size of one input of a refund, in virtual bytes."""
    return -(-input_weight(terms.kind.refund(terms, LARGEST_SIGNATURE)) // 4)


def refund_size(terms: ChannelTerms, outputs: int, refund_script: bytes) -> int:
    """Largest size of a refund of this many outputs, in virtual bytes: signatures have 70 to 72 bytes."""
    unsigned = UnsignedTransaction(
        [OutPoint(bytes(32), 0)] * outputs, [(Sat(0), refund_script)], [REFUND_SEQUENCE] * outputs, lock_time=0
    )
    return virtual_size(unsigned.signed([terms.kind.refund(terms, LARGEST_SIGNATURE)] * outputs)[0])


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
    unsigned = UnsignedTransaction(
        [coin.outpoint for coin in coins],
        [(Sat(total_sat - fee_sat), refund_script)],
        [sequence] * len(coins),
        lock_time=terms.expiry.lock_time,
    )
    kind = terms.kind
    digests = [kind.settlement_digest(unsigned, index, terms, coin.value_sat) for index, coin in enumerate(coins)]
    raw, txid = unsigned.signed([kind.refund(terms, key.sign(digest, hasher=None)) for digest in digests])
    return Refund(raw, txid, fee_sat)


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
    size = sign_refunds(key, terms, coins, refund_script, Sat(0), sequence=sequence).size
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
