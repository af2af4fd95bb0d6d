"""Transactions in the form that settlements use: version 1, no lock time, no witness.

The sequences of channels' inputs are final, as their clients signed them. Inputs that only the server signs signal that
the transaction may be replaced (BIP125), for nodes that replace no other transaction.

The module lays out the bytes itself, because they are few and because building the same with python-bitcoinlib takes
longer than signing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from bitcoin.core import CTransaction

from paychan.protocol.types import OutPoint, Sat

_VERSION = b"\x01\x00\x00\x00"
FINAL_SEQUENCE = 0xFFFFFFFF
"""Part of what the client signed (RBPCP §3)."""
_FINAL = FINAL_SEQUENCE.to_bytes(4, "little")

_HIGHEST_SIGNALLING = 0xFFFFFFFD
"""BIP125: a lower sequence than 0xffffffff - 1 is the signal."""
_SIGNALLING = _HIGHEST_SIGNALLING.to_bytes(4, "little")

_BLANK_BYTES = 36 + 1 + 4
"""An input without a script."""
_LOCK_TIME = b"\x00\x00\x00\x00"
_SIGHASH_ALL = b"\x01\x00\x00\x00"


class FinalTransaction:
    """The spent outpoints in order, and the outputs: (satoshi, scriptPubKey)."""

    __slots__ = ("_blank", "_counted", "_end", "_sequences", "_spent", "inputs", "outputs")

    def __init__(self, inputs: Sequence[OutPoint], outputs: Sequence[tuple[Sat, bytes]], ours: int = 0) -> None:
        """Store inputs and outputs; the last `ours` inputs need only the server's signature."""
        self.inputs = inputs
        self._sequences = [_FINAL] * (len(inputs) - ours) + [_SIGNALLING] * ours
        self.outputs = outputs
        self._counted = _VERSION + varint(len(inputs))
        self._spent = [outpoint.serialize() for outpoint in inputs]
        self._blank = b"".join(
            [b"%b\x00%b" % each for each in zip(self._spent, self._sequences, strict=True)],
        )
        paid = [b"%b%b%b" % (value.to_bytes(8, "little"), varint(len(script)), script) for value, script in outputs]
        self._end = varint(len(outputs)) + b"".join(paid) + _LOCK_TIME

    def serialize(self, script_sigs: Sequence[bytes] = ()) -> bytes:
        """Return the transaction's bytes with a scriptSig for each input; without `script_sigs` they are empty."""
        if not script_sigs:
            return self._counted + self._blank + self._end
        spent = [
            b"%b%b%b%b" % (outpoint, varint(len(script)), script, sequence)
            for outpoint, script, sequence in zip(self._spent, script_sigs, self._sequences, strict=True)
        ]
        return self._counted + b"".join(spent) + self._end

    def digest(self, index: int, script_code: bytes) -> bytes:
        """Return the digest of this input's SIGHASH_ALL signature: only this input has a script, the others are blank.

        Raises:
            IndexError: no such input. Bitcoin Core's digest is then the constant 1, which must never be signed.
        """
        if not 0 <= index < len(self._spent):
            msg = f"input {index} of {len(self._spent)}"
            raise IndexError(msg)
        begin = index * _BLANK_BYTES
        before, after = self._blank[:begin], self._blank[begin + _BLANK_BYTES :]
        spent = b"%b%b%b%b" % (self._spent[index], varint(len(script_code)), script_code, self._sequences[index])
        return double_sha256(b"%b%b%b%b%b%b" % (self._counted, before, spent, after, self._end, _SIGHASH_ALL))


def signals_replaceability(transaction: bytes) -> bool:
    """Say whether a transaction signals that it may be replaced (BIP125)."""
    return any(txin.nSequence <= _HIGHEST_SIGNALLING for txin in CTransaction.deserialize(transaction).vin)


def double_sha256(data: bytes) -> bytes:
    """Hash of txids and signature hashes."""
    return sha256(sha256(data).digest()).digest()


def varint(number: int) -> bytes:
    """Write a count or a length below 2^32 (CompactSize)."""
    if number < 0xFD:
        return bytes([number])
    return b"\xfd" + number.to_bytes(2, "little") if number <= 0xFFFF else b"\xfe" + number.to_bytes(4, "little")
