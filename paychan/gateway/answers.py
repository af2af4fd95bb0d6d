"""Answers of paid requests: kept for some minutes, and sent again when the same request is repeated.

A payer whose answer was lost repeats its request with the same payment. It is not charged again; as long as the answer
is kept, the upstream does not work again either. Answers are in memory alone, bounded in bytes and in age.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import TypeAlias

from msgspec import Struct

from paychan.gateway.pricefile import Answers
from paychan.protocol.types import OutPoint

Key: TypeAlias = tuple[OutPoint, bytes]
"""A channel, and the id of a request."""

_OVERHEAD_BYTES = 500
"""Memory of an answer beside its body and headers."""


class Stored(Struct, frozen=True):
    """A whole answer of the upstream, without the payment's own headers."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def size(self) -> int:
        """Memory that it takes, in bytes."""
        return len(self.body) + sum(len(name) + len(value) for name, value in self.headers) + _OVERHEAD_BYTES


class StoredAnswers:
    """The answers of one gateway."""

    def __init__(self, settings: Answers, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._most_bytes = settings.size_mb * 1_000_000
        self.largest_bytes = min(settings.largest_kb * 1000, self._most_bytes)
        """A larger body is not kept."""
        self._seconds = settings.minutes * 60
        self._kept: OrderedDict[Key, tuple[float, Stored]] = OrderedDict()
        self._bytes = 0

    def find(self, key: Key) -> Stored | None:
        """Return the answer of a request if it is kept."""
        self._forget()
        found = self._kept.get(key)
        return None if found is None else found[1]

    def keep(self, key: Key, stored: Stored) -> None:
        """Keep an answer; the oldest ones make room."""
        self.drop(key)
        if stored.size > self._most_bytes:
            return
        self._kept[key] = (self._clock(), stored)
        self._bytes += stored.size
        self._forget()

    def drop(self, key: Key) -> None:
        """Forget an answer, because its price was given back."""
        found = self._kept.pop(key, None)
        if found is not None:
            self._bytes -= found[1].size

    def _forget(self) -> None:
        ends = self._clock() - self._seconds
        while self._kept:
            key, (begun, _) = next(iter(self._kept.items()))
            if begun > ends and self._bytes <= self._most_bytes:
                return
            self.drop(key)
