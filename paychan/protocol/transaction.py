"""Transactions of the one shape that settlements have: version 1, no lock time, every sequence final, no witness.

Laid out by hand, because this is what gets signed: the bytes are few, and building the same with python-bitcoinlib takes
longer than signing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from msgspec import Struct

from paychan.protocol.types import OutPoint, Sat

_VERSION = b"\x01\x00\x00\x00"
FINAL_SEQUENCE = 0xFFFFFFFF
"""Part of what the client signed (PROTOCOL §3)."""
_FINAL = FINAL_SEQUENCE.to_bytes(4, "little")
_LOCK_TIME = b"\x00\x00\x00\x00"
_SIGHASH_ALL = b"\x01\x00\x00\x00"


class FinalTransaction(Struct, frozen=True):
    """What is spent, in order, and what is paid: (satoshi, scriptPubKey)."""

    inputs: tuple[OutPoint, ...]
    outputs: tuple[tuple[Sat, bytes], ...]

    def serialize(self, script_sigs: Sequence[bytes] = ()) -> bytes:
        """Return the transaction's bytes with a scriptSig for each input; with none, those are empty."""
        scripts = script_sigs or [b""] * len(self.inputs)
        parts = [_VERSION, varint(len(self.inputs))]
        for outpoint, script in zip(self.inputs, scripts, strict=True):
            parts += (outpoint.serialize(), varint(len(script)), script, _FINAL)
        parts.append(varint(len(self.outputs)))
        for value_sat, script in self.outputs:
            parts += (value_sat.to_bytes(8, "little"), varint(len(script)), script)
        parts.append(_LOCK_TIME)
        return b"".join(parts)

    def digest(self, index: int, script_code: bytes) -> bytes:
        """Return what a SIGHASH_ALL signature of this input commits to: the script code stands in its place alone.

        Raises:
            IndexError: no such input. What Bitcoin Core signs then is the constant 1, which must never happen.
        """
        if not 0 <= index < len(self.inputs):
            msg = f"input {index} of {len(self.inputs)}"
            raise IndexError(msg)
        scripts = [b""] * len(self.inputs)
        scripts[index] = script_code
        return double_sha256(self.serialize(scripts) + _SIGHASH_ALL)


def double_sha256(data: bytes) -> bytes:
    """What txids and signature hashes are made with."""
    return sha256(sha256(data).digest()).digest()


def varint(number: int) -> bytes:
    """Write a count or a length below 2^32 (CompactSize)."""
    if number < 0xFD:
        return bytes([number])
    return b"\xfd" + number.to_bytes(2, "little") if number <= 0xFFFF else b"\xfe" + number.to_bytes(4, "little")
