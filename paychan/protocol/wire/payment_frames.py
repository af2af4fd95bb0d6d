"""Binary frames of the payment stream: payments from the client, answers from the server. Integers are little endian.

A frame of payments holds payments of one channel, in the order in which the client made them:

    offset  bytes
    0       1      version: 1
    1+72n   8      change value in satoshi of payment n
    9+72n   32     r of its signature, big endian as in a compact signature
    41+72n  32     s

The hash flag follows from the change value: 0x83 for a value above 0, 0x82 for 0. `s` may be in the upper half of the
group's order; the server converts it to strict DER with low S before it verifies and stores it.

A frame of answers holds one answer for each payment, in order. One frame may answer several frames of payments: answers
are counted, not frames.

    offset  bytes
    0       1      version: 1
    then, for each payment, either
    0       1      0: accepted, and the channel stays open
    1       8      change value that is left to the client
    9       8      value that the payment brought
    or
    0       1      1: any other answer
    1       2      status with which `PUT` would have answered (200: accepted)
    3       4      length of the body
    7       …      JSON body with which `PUT` would have answered
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, repeat
from struct import Struct as Layout
from typing import Any, overload

from msgspec import Struct

from paychan.protocol.errors import Malformed
from paychan.protocol.keys import GROUP_ORDER
from paychan.protocol.kinds.p2sh import P2SH
from paychan.protocol.payment import Payment
from paychan.protocol.types import Sat

VERSION = 1

MAX_FRAME_PAYMENTS = 128
"""Checking this number of signatures one by one delays other callers by some milliseconds."""

_HEAD = bytes([VERSION])
_PAYMENT = Layout("<Q32s32s")
_TAKEN = Layout("<BQQ")
_SAID = Layout("<BHI")
_IS_TAKEN, _IS_SAID = 0, 1


class Taken(Struct, frozen=True):
    """A payment was accepted; amounts in satoshi."""

    change_sat: Sat
    value_sat: Sat


class Said(Struct, frozen=True):
    """Answer of `PUT` to the same payment: a refusal, the end of the channel, or the application's data."""

    status: int
    body: bytes


def write_payments(payments: Iterable[Payment]) -> bytes:
    """Lay out a frame of payments. Their flags must follow from the change values as described above."""
    return _HEAD + b"".join(_PAYMENT.pack(each.change_sat, *_numbers(each.signature)) for each in payments)


class CompactPayments(Sequence[Payment]):
    """The payments of a frame; a `Payment` object is made only when it is read."""

    __slots__ = ("changes", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.changes: Sequence[Sat] = _changes(len(raw) // _PAYMENT.size).unpack(raw)
        """Change values of all payments, in satoshi."""

    def __len__(self) -> int:
        return len(self.changes)

    @overload
    def __getitem__(self, index: int) -> Payment: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Payment]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        change, r, s = _PAYMENT.unpack_from(self.raw, range(len(self))[index] * _PAYMENT.size)
        return Payment(change, der_signature(r, s), P2SH.change_flag if change else P2SH.drained_flag)

    def behind(self, count: int) -> CompactPayments:
        """Return the payments after the first `count`."""
        return CompactPayments(self.raw[count * _PAYMENT.size :])

    @classmethod
    def joined(cls, several: Sequence[CompactPayments]) -> CompactPayments:
        """Return the payments of several frames in sequence."""
        return several[0] if len(several) == 1 else cls(b"".join(each.raw for each in several))


def read_payments(frame: bytes) -> CompactPayments:
    """Read a frame of payments.

    Raises:
        Malformed: another version, no payment, or an incomplete one.
    """
    if frame[:1] != _HEAD:
        raise Malformed(field="version", reason=f"got {frame[:1].hex() or 'an empty frame'}, want {_HEAD.hex()}")
    if len(frame) == 1 or (len(frame) - 1) % _PAYMENT.size:
        raise Malformed(field="frame", reason=f"got {len(frame)} bytes, want 1 and {_PAYMENT.size} for each payment")
    return CompactPayments(frame[1:])


@cache
def _changes(count: int) -> Layout:
    """Layout that reads the change values of `count` payments."""
    return Layout("<" + "Q64x" * count)


def write_taken(changes: Sequence[Sat], values: Sequence[Sat]) -> bytes:
    """Lay out a frame that accepts payments: the change that each left and the value that it brought, in satoshi."""
    return _taken(len(changes)).pack(
        VERSION, *chain.from_iterable(zip(repeat(_IS_TAKEN), changes, values, strict=False))
    )


@cache
def _taken(count: int) -> Layout:
    return Layout("<B" + "BQQ" * count)


def write_answers(answers: Iterable[Taken | Said]) -> bytes:
    """Lay out a frame of answers."""
    return _HEAD + b"".join(
        _TAKEN.pack(_IS_TAKEN, each.change_sat, each.value_sat)
        if isinstance(each, Taken)
        else _SAID.pack(_IS_SAID, each.status, len(each.body)) + each.body
        for each in answers
    )


def read_answers(frame: bytes) -> list[Taken | Said]:
    """Read a frame of answers.

    Raises:
        Malformed: another version, an unknown kind of answer, or an incomplete one.
    """
    if frame[:1] != _HEAD:
        raise Malformed(field="version", reason=f"got {frame[:1].hex() or 'an empty frame'}, want {_HEAD.hex()}")
    answers: list[Taken | Said] = []
    at = 1
    while at < len(frame):
        answer, at = _answer_at(frame, at)
        answers.append(answer)
    return answers


def _answer_at(frame: bytes, at: int) -> tuple[Taken | Said, int]:
    kind, rest = frame[at], len(frame) - at
    if kind == _IS_TAKEN and rest >= _TAKEN.size:
        _, change, value = _TAKEN.unpack_from(frame, at)
        return Taken(Sat(change), Sat(value)), at + _TAKEN.size
    if kind == _IS_SAID and rest >= _SAID.size:
        _, status, size = _SAID.unpack_from(frame, at)
        at += _SAID.size
        if size <= len(frame) - at:
            return Said(status, frame[at : at + size]), at + size
    raise Malformed(field="frame", reason=f"answer at byte {at} is cut off or of an unknown kind ({kind})")


def der_signature(r: bytes, s: bytes) -> bytes:
    """Write two numbers of 32 bytes as a DER signature (BIP66), with low S if S is below the group's order.

    Numbers that no valid signature has become DER that does not verify.
    """
    if s[0] >= 0x7F:  # every number of the upper half starts with such a byte
        number = int.from_bytes(s)
        if GROUP_ORDER // 2 < number < GROUP_ORDER:
            s = (GROUP_ORDER - number).to_bytes(32)
    if s[0] and s[0] < 0x80:
        if r[0] >= 0x80:  # nearly all signatures have one of these two forms
            return b"\x30\x45\x02\x21\x00" + r + b"\x02\x20" + s
        if r[0]:
            return b"\x30\x44\x02\x20" + r + b"\x02\x20" + s
    r, s = _integer(r), _integer(s)
    return bytes((0x30, len(r) + len(s) + 4, 0x02, len(r))) + r + bytes((0x02, len(s))) + s


def _integer(number: bytes) -> bytes:
    """Return the shortest DER form that is not negative."""
    short = number.lstrip(b"\x00")
    return short if short and short[0] < 0x80 else b"\x00" + short


def _numbers(signature: bytes) -> tuple[bytes, bytes]:
    """Return the two numbers of a strict DER signature, 32 bytes each."""
    r_size = signature[3]
    r, s = signature[4 : 4 + r_size], signature[6 + r_size :]
    return r.lstrip(b"\x00").rjust(32, b"\x00"), s.lstrip(b"\x00").rjust(32, b"\x00")
