"""Transactions in the form that settlements and refunds use: version 1, and a sequence for each input.

In settlements the sequences of channels' inputs are final, as their clients signed them. Inputs that only the server
signs signal that the transaction may be replaced (BIP125), for nodes that replace no other transaction.

The module lays out the bytes itself, because they are few and because building the same with python-bitcoinlib takes
longer than signing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TypeAlias

from bitcoin.core import CTransaction

from paychan.protocol.types import OutPoint, Sat

Unlocking: TypeAlias = tuple[bytes, tuple[bytes, ...]]
"""ScriptSig and witness of an input."""

_VERSION = b"\x01\x00\x00\x00"
FINAL_SEQUENCE = 0xFFFFFFFF
"""Part of what the client signed (RBPCP §3)."""

SIGNALLING_SEQUENCE = 0xFFFFFFFD
"""BIP125: a lower sequence than 0xffffffff - 1 is the signal."""

_FRAME_BYTES = 4 + 4  # version, lock time
_VALUE_BYTES = 8

_BLANK_BYTES = 36 + 1 + 4
"""An input without a script."""
_SIGHASH_ALL = b"\x01\x00\x00\x00"
_SEGWIT = b"\x00\x01"
"""BIP144: marker and flag after the version of a transaction with witnesses."""


class UnsignedTransaction:
    """The spent outpoints in order with their sequences, the outputs (satoshi, scriptPubKey), and the lock time."""

    __slots__ = (
        "_begin",
        "_blank",
        "_counted",
        "_end",
        "_lock_time",
        "_paid",
        "_sequences",
        "_spent",
        "inputs",
        "lock_time",
        "outputs",
        "sequences",
    )

    def __init__(
        self,
        inputs: Sequence[OutPoint],
        outputs: Sequence[tuple[Sat, bytes]],
        sequences: Sequence[int],
        lock_time: int = 0,
    ) -> None:
        self.inputs, self.outputs, self.sequences, self.lock_time = inputs, outputs, sequences, lock_time
        self._sequences = [each.to_bytes(4, "little") for each in sequences]
        self._counted = varint(len(inputs))
        self._spent = [outpoint.serialize() for outpoint in inputs]
        self._blank = b"".join(
            [b"%b\x00%b" % each for each in zip(self._spent, self._sequences, strict=True)],
        )
        paid = [
            b"%b%b%b" % (value.to_bytes(8, "little", signed=True), varint(len(script)), script)
            for value, script in outputs
        ]
        self._paid = varint(len(outputs)) + b"".join(paid)
        self._lock_time = lock_time.to_bytes(4, "little")
        self._begin, self._end = _VERSION + self._counted, self._paid + self._lock_time

    @classmethod
    def read(cls, transaction: CTransaction) -> UnsignedTransaction:
        """Take the layout of a transaction of version 1, without its scripts and witnesses."""
        return cls(
            [OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n)) for txin in transaction.vin],
            [(Sat(out.nValue), bytes(out.scriptPubKey)) for out in transaction.vout],
            [txin.nSequence for txin in transaction.vin],
            transaction.nLockTime,
        )

    def serialize(self) -> bytes:
        """Return the transaction's bytes with empty scripts."""
        return self._begin + self._blank + self._end

    def signed(self, unlockings: Sequence[Unlocking]) -> tuple[bytes, bytes]:
        """Return the transaction with these scripts and witnesses, and its txid in internal byte order."""
        spent = [
            b"%b%b%b%b" % (outpoint, varint(len(script)), script, sequence)
            for outpoint, (script, _), sequence in zip(self._spent, unlockings, self._sequences, strict=True)
        ]
        inputs = b"".join(spent)
        legacy = self._begin + inputs + self._end
        if not any(witness for _, witness in unlockings):
            return legacy, double_sha256(legacy)
        body = self._counted + inputs + self._paid
        witnesses = b"".join([_serialized(witness) for _, witness in unlockings])
        return b"%b%b%b%b%b" % (_VERSION, _SEGWIT, body, witnesses, self._lock_time), double_sha256(legacy)

    def legacy_digest(self, index: int, script_code: bytes) -> bytes:
        """Return the digest of before segwit for a SIGHASH_ALL signature: only this input has a script.

        Raises:
            IndexError: no such input. Bitcoin Core's digest is then the constant 1, which must never be signed.
        """
        if not 0 <= index < len(self._spent):
            msg = f"input {index} of {len(self._spent)}"
            raise IndexError(msg)
        begin = index * _BLANK_BYTES
        before, after = self._blank[:begin], self._blank[begin + _BLANK_BYTES :]
        spent = b"%b%b%b%b" % (self._spent[index], varint(len(script_code)), script_code, self._sequences[index])
        return double_sha256(b"%b%b%b%b%b%b" % (self._begin, before, spent, after, self._end, _SIGHASH_ALL))


def unlockings_of(transaction: CTransaction) -> list[Unlocking]:
    """Read script and witness of each input."""
    witnesses = [tuple(map(bytes, each.scriptWitness.stack)) for each in transaction.wit.vtxinwit]
    witnesses += [()] * (len(transaction.vin) - len(witnesses))
    return [(bytes(txin.scriptSig), witness) for txin, witness in zip(transaction.vin, witnesses, strict=True)]


def input_weight(unlocking: Unlocking) -> int:
    """Weight of an input (BIP141); an input without witness weighs one more in a transaction with witnesses."""
    script, witness = unlocking
    return 4 * (36 + len(varint(len(script))) + len(script) + 4) + (len(_serialized(witness)) if witness else 0)


def size_of(input_weights: Sequence[int], output_scripts: Sequence[bytes], with_witness: int = 0) -> int:
    """Size in virtual bytes of a transaction; `with_witness` inputs have a witness."""
    marker = len(_SEGWIT) + len(input_weights) - with_witness if with_witness else 0  # and empty witnesses
    outputs = sum([_VALUE_BYTES + len(varint(len(script))) + len(script) for script in output_scripts])
    rest = _FRAME_BYTES + len(varint(len(input_weights))) + len(varint(len(output_scripts))) + outputs
    return -(-(sum(input_weights) + marker + 4 * rest) // 4)


def virtual_size(transaction: bytes) -> int:
    """Size in virtual bytes (BIP141)."""
    if transaction[4:6] != _SEGWIT:
        return len(transaction)
    base = len(without_witness(transaction))
    return -(-(3 * base + len(transaction)) // 4)


def without_witness(transaction: bytes) -> bytes:
    """Serialize a transaction without witnesses; its txid is the hash of these bytes (BIP141)."""
    whole = CTransaction.deserialize(transaction)
    return bytes(CTransaction(whole.vin, whole.vout, whole.nLockTime, whole.nVersion).serialize())


def push(data: bytes) -> bytes:
    """Write the shortest push of 6 to 255 bytes; shorter data may have an opcode of its own."""
    return b"%c%b" % (len(data), data) if len(data) <= 75 else b"\x4c%c%b" % (len(data), data)


def _serialized(witness: Sequence[bytes]) -> bytes:
    return varint(len(witness)) + b"".join([varint(len(item)) + item for item in witness])


def signals_replaceability(transaction: bytes) -> bool:
    """Say whether a transaction signals that it may be replaced (BIP125)."""
    return any(txin.nSequence <= SIGNALLING_SEQUENCE for txin in CTransaction.deserialize(transaction).vin)


def double_sha256(data: bytes) -> bytes:
    """Hash of txids and signature hashes."""
    return sha256(sha256(data).digest()).digest()


def varint(number: int) -> bytes:
    """Write a count or a length below 2^32 (CompactSize)."""
    if number < 0xFD:
        return bytes([number])
    return b"\xfd" + number.to_bytes(2, "little") if number <= 0xFFFF else b"\xfe" + number.to_bytes(4, "little")
