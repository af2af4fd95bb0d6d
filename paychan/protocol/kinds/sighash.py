"""Signature hashes: the pre-segwit digest that a signature commits to (RBPCP §3), with a prefix built per channel."""

from __future__ import annotations

from hashlib import sha256

from bitcoin.core import CTransaction
from bitcoin.core.script import CScript, SignatureHash

from paychan.protocol.kinds.script import ChannelTerms
from paychan.protocol.types import OutPoint, Sat

SIGHASH_ALL = 0x01
SINGLE_ANYONECANPAY = 0x83
"""Required while the client keeps change: binds input i to output i, and lets the server add inputs and outputs."""
NONE_ANYONECANPAY = 0x82
"""Required when no change is left: the payment has no output."""


_DRAINED = b"\x00\x00\x00\x00\x00\x82\x00\x00\x00"
"""No output, no lock time, and the flag."""


class PaymentHasher:
    """Digests of the payments of one channel; it builds the bytes around the change value once."""

    __slots__ = ("_head", "_tail")

    def __init__(self, terms: ChannelTerms, outpoint: OutPoint, change_script: bytes) -> None:
        script = terms.redeem_script
        self._head = b"".join(
            (
                b"\x01\x00\x00\x00\x01",  # version 1, one input
                outpoint.serialize(),
                bytes([len(script)]),
                script,
                b"\xff\xff\xff\xff\x01",  # sequence, one output
            )
        )
        self._tail = bytes([len(change_script)]) + change_script + b"\x00\x00\x00\x00\x83\x00\x00\x00"

    def digest(self, change_sat: Sat, flag: int) -> bytes:
        """Return the 32 bytes signed for a change value; `flag` must already fit it (`payment.change_problem`)."""
        if flag == NONE_ANYONECANPAY:
            return sha256(sha256(self._head[:-1] + _DRAINED).digest()).digest()
        return sha256(sha256(self._head + change_sat.to_bytes(8, "little") + self._tail).digest()).digest()


def whole_transaction_digest(transaction: CTransaction, index: int, redeem_script: bytes) -> bytes:
    """SIGHASH_ALL digest of one input; the server's and the refund's signatures use only this kind."""
    return bytes(SignatureHash(CScript(redeem_script), transaction, index, SIGHASH_ALL))
