"""A metered answer as its payer reads it: events about the payment are taken out, and units are counted. It is pure.

An event stream says by `payment-need-voucher` that its credit is used up (`bindings/mpp.md`). Any other body only pauses:
the payer counts bytes, kilobytes, lines or seconds, and pays before the read that would wait.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

from paychan.client.paying.demands import Headers
from paychan.protocol.errors import PaychanError
from paychan.protocol.wire.canonical import to_base64url
from paychan.protocol.wire.mpp_outcomes import NEED_VOUCHER_EVENT, RECEIPT_EVENT, read_receipt
from paychan.protocol.wire.offers import Settled

METERED_UNITS = ("event", "byte", "kilobyte", "second")
_SIZES = {"byte": 1, "kilobyte": 1000}
_EVENT_STREAM = "text/event-stream"
_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_END_OF_LINE = re.compile(rb"\r\n|\n|\r")
_LONGEST_EVENT = 1_000_000
"""A longer piece without an end is passed on unread: no event about a payment is as long."""

_AHEAD_SECONDS = 1
"""The server's clock of the answer began before the payer's."""


class Need(Struct, frozen=True):
    """The server asks for a payment, and waits."""


class Final(Struct, frozen=True):
    """The receipt that ends an event stream."""

    settled: Settled | None
    """None if it can't be read."""


class EventFilter:
    """Separates the events about the payment from the seller's."""

    def __init__(self) -> None:
        self._rest = b""
        self.events = 0
        """Number of the seller's events so far."""

    def feed(self, raw: bytes) -> list[bytes | Need | Final]:
        """Return the events that are whole now, unchanged, or the meaning of one about the payment."""
        self._rest += raw
        found: list[bytes | Need | Final] = []
        at = passed = 0
        for end in _END_OF_EVENT.finditer(self._rest):
            event, at = self._rest[at : end.end()], end.end()
            meaning = _meaning(event)
            if meaning is None:
                self.events += 1
                continue
            found += [self._rest[passed : at - len(event)], meaning]
            passed = at
        found.append(self._rest[passed:at])
        self._rest = self._rest[at:]
        if len(self._rest) > _LONGEST_EVENT:
            found.append(self.rest())
        return [each for each in found if each != b""]

    def rest(self) -> bytes:
        """Return an event at the end that is not whole."""
        rest, self._rest = self._rest, b""
        return rest


class Count:
    """Counts the units of an answer that arrived."""

    def __init__(self, unit: str, headers: Headers, begun: float) -> None:
        fields = dict(headers)
        self.unit, self._begun, self._bytes, self._lines = unit, begun, 0, 0
        kind = fields.get("content-type", "").partition(";")[0].strip().lower()
        is_plain = fields.get("content-encoding", "identity").strip().lower() == "identity"
        self.events = EventFilter() if kind == _EVENT_STREAM and is_plain else None

    def feed(self, raw: bytes) -> list[bytes | Need | Final]:
        """Count a chunk; return its parts for the program, and the notices between them."""
        self._bytes += len(raw)
        if self.events is not None:
            return self.events.feed(raw)
        if self.unit == "event":
            self._lines += raw.count(b"\n")
        return [raw] if raw else []

    def units(self, now: float) -> int:
        """Return the number of units that have begun."""
        if self.unit == "second":
            return int(now - self._begun) + 1
        if self.unit == "event":
            return self._lines if self.events is None else self.events.events
        return -(-self._bytes // _SIZES[self.unit])

    def must_pay(self, covered: int, now: float) -> bool:
        """Say whether the server may wait for a payment now that it can't ask for; `covered` units are paid."""
        if self.events is not None:
            return False
        if self.unit in _SIZES:
            return self._bytes >= covered * _SIZES[self.unit]
        return self.units(now) + (_AHEAD_SECONDS if self.unit == "second" else 0) >= covered

    def seconds_left(self, covered: int, now: float) -> float | None:
        """Return the time until the next payment of an answer by the second; None for another unit."""
        if self.unit != "second" or self.events is not None:
            return None
        return max(0.0, covered - 1 - _AHEAD_SECONDS - (now - self._begun))


def _meaning(event: bytes) -> Need | Final | None:
    name, data = b"", b""
    for line in _END_OF_LINE.split(event):
        field, _, value = line.partition(b":")
        if field == b"event":
            name = value.strip()
        elif field == b"data":
            data += value.strip()
    if name == NEED_VOUCHER_EVENT.encode():
        return Need()
    if name != RECEIPT_EVENT.encode():
        return None
    try:
        shown = msgspec.json.decode(data, type=dict[str, Any])
        shown["challengeId"] = shown.get("challengeId") or "none"  # a payment by x402 answers no challenge
        return Final(read_receipt(to_base64url(msgspec.json.encode(shown))).settled)
    except (PaychanError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Final(None)
