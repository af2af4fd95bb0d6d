"""State of one connection of the signer's socket, its reader, and the slots that large frames share.

Used by `connections` only, which decides which peers are answered.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from msgspec import Struct

from paychan.protocol.wire.signer_messages import Request

REQUESTS_IN_FLIGHT = 32
"""Of one connection; further requests stay in the socket. A frame takes a slot for every 2 KiB, and at most 8 slots."""

LARGE_FRAMES = 8
"""Of all connections, from the first byte until the reply: 8 MiB, plus the decoded form of two of them at a time."""

NEVER = float("inf")

_BUFFER_BYTES = 16 * 1024
"""asyncio buffers up to twice this of input; a peer that leaves this much of its replies unread must catch up first."""

_LARGE_SECONDS = 0.3
"""A local peer sends 1 MiB in a few milliseconds."""


class Peer:
    """One connection: its unanswered requests, and the time by which its next input must arrive."""

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
        """Whether its task waits for a frame of which no byte has arrived."""
        return self.is_between and self.reader.is_empty and not self.is_late

    def answered(self) -> None:
        """Count one answer."""
        self.waiting -= 1
        if self._has_all is not None and not self.waiting:
            self._has_all.set()

    async def has_all(self) -> None:
        """Wait until every answer was given, and was read by the peer if it still reads."""
        if self.waiting:
            self._has_all = asyncio.Event()
            await self._has_all.wait()
        if self.draining:
            await asyncio.wait(self.draining)

    def end_reading(self) -> None:
        """Stop reading: the peer is late, and further input is ignored."""
        self.is_late, self.due_at = True, NEVER
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio types it as a write transport
        self.reader.feed_eof()


class Reader(asyncio.StreamReader):
    """Received input that was not read yet."""

    @property
    def is_empty(self) -> bool:
        """Whether all received input was read."""
        return not self._buffer  # type: ignore[attr-defined]  # private, in all asyncio versions that have streams


class Stream(asyncio.StreamReaderProtocol):
    """Fills a reader, except with input that the shortcut takes."""

    shortcut: Callable[[bytes], bool] | None = None
    """Takes the received input (True), or leaves it to the reader (False)."""

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self.shortcut is None or not self.shortcut(data):
            super().data_received(data)


async def open_peer(connection: socket.socket, uid: int) -> Peer:
    """Attach the event loop to a connection of this user. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = Reader(_BUFFER_BYTES, loop)
    stream = Stream(reader, loop=loop)
    transport, _ = await loop.create_unix_connection(lambda: stream, sock=connection)
    transport.set_write_buffer_limits(_BUFFER_BYTES)
    return Peer(stream, reader, asyncio.StreamWriter(transport, stream, reader, loop), uid)


class Asked(Struct, frozen=True):
    """A request with its size in bytes, and the slots that it occupies until it is answered."""

    request: Request
    size: int
    places: int


class LargeFrames:
    """Slots for large frames. A peer that sends its frame slowly loses its slot to peers that wait."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(LARGE_FRAMES)
        self._sending: dict[Peer, float] = {}

    async def enter(self, peer: Peer) -> None:
        """Wait for a slot; disconnect a peer that has been sending for too long.

        Raises:
            ConnectionError: this peer was itself disconnected meanwhile.
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
        """Mark a frame as complete; its slot stays taken until the frame is answered."""
        self._sending.pop(peer, None)

    def leave(self, peer: Peer) -> None:
        """Forget a disconnected peer; free its slot if its frame is incomplete."""
        if peer in self._sending:
            del self._sending[peer]
            self.free()

    def free(self) -> None:
        """Free the slot of an answered frame."""
        self._places.release()
