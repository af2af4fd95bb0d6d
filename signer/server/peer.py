"""What is known of one connection of the signer's socket, how it is read, and the places that large frames share.

For `connections` alone, which decides who is answered.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from msgspec import Struct

from paychan.protocol.wire.signer_messages import Request

REQUESTS_IN_FLIGHT = 32
"""Of one connection; further ones stay in the socket. A frame takes a place for every 2 KiB of it, and 8 at most."""

LARGE_FRAMES = 8
"""Of all connections, from the first byte until they are answered: 8 MiB, and what is made of two of them at a time."""

NEVER = float("inf")

_BUFFER_BYTES = 16 * 1024
"""asyncio reads on up to twice this, and waits for a peer that has so much of replies unread."""

_LARGE_SECONDS = 0.3
"""A peer on this machine sends 1 MiB in a few milliseconds."""


class Peer:
    """One connection: what it waits for, and until when the next of it must have come."""

    __slots__ = (
        "_has_all",
        "draining",
        "due_at",
        "is_between",
        "is_half",
        "is_late",
        "places",
        "reader",
        "stream",
        "uid",
        "waiting",
        "writer",
    )

    def __init__(self, stream: Stream, reader: Reader, writer: asyncio.StreamWriter, uid: int) -> None:
        self.stream = stream
        self.reader = reader
        self.writer = writer
        self.uid = uid
        self.waiting = 0
        self.places = asyncio.Semaphore(REQUESTS_IN_FLIGHT)
        self.draining: set[asyncio.Task[None]] = set()
        self.due_at = NEVER
        self.is_half = self.is_late = self.is_between = False
        self._has_all: asyncio.Event | None = None

    @property
    def is_at_rest(self) -> bool:
        """Whether its task waits for a frame of which nothing has come yet."""
        return self.is_between and self.reader.is_empty and not self.is_late

    def given(self) -> None:
        """One answer less to wait for."""
        self.waiting -= 1
        if self._has_all is not None and not self.waiting:
            self._has_all.set()

    async def has_all(self) -> None:
        """Wait until every answer was given, and taken by whoever still reads."""
        if self.waiting:
            self._has_all = asyncio.Event()
            await self._has_all.wait()
        if self.draining:
            await asyncio.wait(self.draining)

    def end_reading(self) -> None:
        """It is late: what it sends from now on is not read."""
        self.is_late, self.due_at = True, NEVER
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio types it as a write transport
        self.reader.feed_eof()


class Reader(asyncio.StreamReader):
    """What has come of one connection and was not read yet."""

    @property
    def is_empty(self) -> bool:
        """Whether all that has come was read."""
        return not self._buffer  # type: ignore[attr-defined]  # there as long as there are streams


class Stream(asyncio.StreamReaderProtocol):
    """Fills a reader, but for what goes a shorter way."""

    shortcut: Callable[[bytes], bool] | None = None
    """Takes what has come, or says that it is for the reader."""

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self.shortcut is None or not self.shortcut(data):
            super().data_received(data)


async def open_peer(connection: socket.socket, uid: int) -> Peer:
    """Have the event loop read a connection of this user. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = Reader(_BUFFER_BYTES, loop)
    stream = Stream(reader, loop=loop)
    transport, _ = await loop.create_unix_connection(lambda: stream, sock=connection)
    transport.set_write_buffer_limits(_BUFFER_BYTES)
    return Peer(stream, reader, asyncio.StreamWriter(transport, stream, reader, loop), uid)


class Asked(Struct, frozen=True):
    """A request, and what it takes until it is answered."""

    request: Request
    size: int
    places: int


class LargeFrames:
    """Places for large frames. Who is slow to send its frame gives its place up to others that wait."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(LARGE_FRAMES)
        self._sending: dict[Peer, float] = {}

    async def enter(self, peer: Peer) -> None:
        """Wait for a place, or cut off whoever has been sending for too long.

        Raises:
            ConnectionError: the peer was itself cut off meanwhile.
        """
        now = asyncio.get_running_loop().time
        while self._places.locked():
            if peer.writer.transport.is_closing():
                raise ConnectionAbortedError
            slow = next((each for each, begun in self._sending.items() if now() - begun > _LARGE_SECONDS), None)
            if slow is None:
                await asyncio.sleep(_LARGE_SECONDS / 10)
                continue
            del self._sending[slow]
            self.free()
            slow.writer.transport.abort()
        await self._places.acquire()
        self._sending[peer] = now()

    def has_come(self, peer: Peer) -> None:
        """The frame is here whole; its place stays taken until it was answered."""
        self._sending.pop(peer, None)

    def leave(self, peer: Peer) -> None:
        """The peer is gone; if its frame did not come whole, its place is free."""
        if peer in self._sending:
            del self._sending[peer]
            self.free()

    def free(self) -> None:
        """A large frame was answered."""
        self._places.release()
