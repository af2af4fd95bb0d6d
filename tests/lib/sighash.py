"""A second opinion about signature hashes: python-bitcoinlib's."""

from __future__ import annotations

from bitcoin.core import CTransaction
from bitcoin.core.script import SIGHASH_ALL, CScript, SignatureHash


def whole_transaction_digest(transaction: CTransaction, index: int, script: bytes) -> bytes:
    """SIGHASH_ALL digest of before segwit, of one input."""
    return bytes(SignatureHash(CScript(script), transaction, index, SIGHASH_ALL))
