"""Outputs to one key (P2PKH): the reserve's coins, and the server's output of a settlement. Not a channel kind."""

from __future__ import annotations

from paychan.protocol.address import key_script
from paychan.protocol.kinds.base import LARGEST_SIGNATURE, SIGHASH_ALL
from paychan.protocol.tx import Unlocking, UnsignedTransaction, input_weight, push


def key_digest(transaction: UnsignedTransaction, index: int, public_key: bytes) -> bytes:
    """Return the SIGHASH_ALL digest of an input that spends such an output."""
    return transaction.legacy_digest(index, key_script(public_key))


def key_input(public_key: bytes, signature: bytes) -> Unlocking:
    """`<sig> <key>`; the signature is strict DER without flag."""
    return push(signature + bytes([SIGHASH_ALL])) + push(public_key), ()


def key_input_weight(public_key: bytes) -> int:
    """Return the largest weight of such an input (BIP141)."""
    return input_weight(key_input(public_key, LARGEST_SIGNATURE))


def read_key_input(unlocking: Unlocking) -> tuple[bytes, bytes]:
    """Return signature with flag and key of such an input; the caller must check both.

    Raises:
        IndexError: the script is empty.
    """
    script, _ = unlocking
    size = script[0]
    return script[1 : 1 + size], script[2 + size :]
