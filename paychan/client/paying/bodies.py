"""Bodies of requests that must be sent twice: the part of a stream up to a limit is kept. It is pure."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from hashlib import sha256

from msgspec import Struct

BUFFER_BYTES = 1024 * 1024
"""Longest stream as a body that is kept for the paid request, unless the program names another limit."""


class Kept(Struct):
    """The beginning of a body, and the rest if it is longer than the limit."""

    start: bytes
    rest: Iterator[bytes] | AsyncIterator[bytes] | None = None

    @property
    def digest(self) -> bytes | None:
        """SHA-256 of the body; None if it can be sent once only."""
        return sha256(self.start).digest() if self.rest is None else None


def keep(parts: Iterable[bytes], limit_bytes: int) -> Kept:
    """Read a body up to the limit."""
    start, rest = bytearray(), iter(parts)
    for part in rest:
        start += part
        if len(start) > limit_bytes:
            return Kept(bytes(start), rest)
    return Kept(bytes(start))


async def keep_async(parts: AsyncIterable[bytes], limit_bytes: int) -> Kept:
    """Do what `keep` does."""
    start, rest = bytearray(), aiter(parts)
    async for part in rest:
        start += part
        if len(start) > limit_bytes:
            return Kept(bytes(start), rest)
    return Kept(bytes(start))


def whole(kept: Kept) -> Iterator[bytes]:
    """Return the body again: the beginning, then the rest."""
    yield kept.start
    if isinstance(kept.rest, Iterator):
        yield from kept.rest


async def whole_async(kept: Kept) -> AsyncIterator[bytes]:
    """Do what `whole` does."""
    yield kept.start
    if isinstance(kept.rest, AsyncIterator):
        async for part in kept.rest:
            yield part
