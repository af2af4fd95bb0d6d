"""Connections of the signer's socket: frames in, frames out, and nobody who can keep the others waiting.

All that a peer can make us hold is bounded, whatever it sends or does not read. When all places are taken, who has asked
nothing for the longest makes room, also in the middle of a frame: the honest find a place during any flood of connections.
A peer that sends what is no request is told why, with request id 0, and the connection ends.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from functools import partial

import structlog
from msgspec import Struct

from paychan.protocol.signerwire import (
    USUAL_FRAME_BYTES,
    Refusal,
    Reply,
    Request,
    WireError,
    decode_request,
    encode_frame,
    frame_size,
)
from signer.answering import SMALL_FRAME_BYTES, Answering, Workplace, tell_bug
from signer.budget import Budget
from signer.socketfile import peer_uid

REQUESTS_IN_FLIGHT = 32
"""Of one connection; further ones stay in the socket. A frame takes a place for every 2 KiB of it, and 8 at most."""

_MOST_PLACES = 8

LARGE_FRAMES = 8
"""Of all connections, from the first byte until they are answered: 8 MiB, and what is made of two of them at a time."""

FAREWELLS = 64
"""Connections that are told why they are turned away; of more, the rest is closed without a word."""

LINES_PER_SECOND = 10
"""Refusals that are logged; the log must not fill the disk. The audit log has its own limit."""

_BUFFER_BYTES = 16 * 1024
"""asyncio reads on up to twice this, and waits for a peer that has so much of replies unread."""

_FAREWELL_SECONDS = 1.0
"""A connection that is closed with unread input loses what was sent to the peer, so we read on for this long."""

_LARGE_SECONDS = 0.3
"""A peer on this machine sends 1 MiB in a few milliseconds."""

_ACCEPT_PAUSE_SECONDS = 0.1

_NEVER = float("inf")

log = structlog.get_logger()


class Limits(Struct, frozen=True):
    """Who is answered, and how long anybody may take."""

    allowed_uids: frozenset[int]
    request_seconds: float
    idle_seconds: float
    max_connections: int


class Connections:
    """Serves the connections of one socket."""

    def __init__(self, answering: Answering, limits: Limits) -> None:
        self._workplace = Workplace(answering, limits.request_seconds)
        self._limits = limits
        self._admitted: dict[_Peer, None] = {}
        """Who has asked nothing for the longest comes first."""
        self._large = _LargeFrames()
        self._leaving = 0
        self._lines = Budget(LINES_PER_SECOND, time.monotonic())

    async def accept(self, listener: socket.socket) -> None:
        """Serve who connects, until cancelled; then all connections end.

        One is let in at a time, and then those who are there have their turn: whoever has sent a request gets it answered before
        so many others have come that it would have to make room. The rest waits in the listener's queue, in order.
        """
        listener.setblocking(False)
        async with asyncio.TaskGroup() as conversations:
            conversations.create_task(self._end_late())
            while True:
                try:
                    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                except OSError as error:  # no file descriptor left, or no memory for one
                    if self._lines.take(time.monotonic()):
                        log.error("can't accept", reason=error.strerror, connections=len(self._admitted))  # noqa: TRY400
                    await asyncio.sleep(0 if self._make_room() else _ACCEPT_PAUSE_SECONDS)
                    continue
                conversations.create_task(self._serve(connection))
                await asyncio.sleep(
                    0
                )  # the others' turn: `sock_accept` does not wait while there is something to accept

    async def _end_late(self) -> None:
        """Look now and then who is late, for ever: a timer for each request would cost more than judging it."""
        while True:
            await asyncio.sleep(min(self._limits.request_seconds, self._limits.idle_seconds) / 10)
            now = asyncio.get_running_loop().time()
            self._workplace.end_late(now)
            for peer in [peer for peer in self._admitted if peer.due_at < now]:
                peer.end_reading()

    def close(self) -> None:
        """Begin no further work."""
        self._workplace.close()

    async def _serve(self, connection: socket.socket) -> None:
        """Answer one connection until it ends. A peer's failure is its own."""
        with connection:
            try:
                uid = peer_uid(connection)
                reader, writer = await asyncio.open_unix_connection(sock=connection, limit=_BUFFER_BYTES)
                writer.transport.set_write_buffer_limits(_BUFFER_BYTES)
                peer = _Peer(reader, writer, uid)
            except OSError:
                return
            try:
                with suppress(ConnectionError, TimeoutError):
                    refusal = self._admission(peer) or await self._converse(peer)
                    if refusal is not None:
                        await self._turn_away(peer, refusal)
                    writer.close()
                    async with asyncio.timeout(_FAREWELL_SECONDS):
                        await writer.wait_closed()  # replies that are still on their way
            except Exception as error:  # noqa: BLE001 - it must not end the others
                tell_bug(error)
            finally:
                writer.transport.abort()

    def _admission(self, peer: _Peer) -> Refusal | None:
        """Let in who is on the list, if there is a place or one can be made."""
        if peer.uid not in self._limits.allowed_uids:
            return Refusal(0, "policy-peer", f"uid {peer.uid} is not in socket.allowed_uids")
        if len(self._admitted) >= self._limits.max_connections and not self._make_room():
            return Refusal(0, "protocol-busy", f"{len(self._admitted)} connections are open and busy")
        return None

    def _make_room(self) -> bool:
        """Close who has asked nothing for the longest, unless all wait for an answer."""
        quiet = next((peer for peer in self._admitted if not peer.waiting), None)
        if quiet is None:
            return False
        del self._admitted[quiet]
        quiet.writer.transport.abort()
        return True

    async def _converse(self, peer: _Peer) -> Refusal | None:
        """Answer requests until the peer ends (None), or sends what is no request."""
        self._admitted[peer] = None
        try:
            async with asyncio.TaskGroup() as answers:
                end = await self._take_requests(peer, answers)
            await peer.has_all()
            return end
        finally:
            self._admitted.pop(peer, None)
            self._large.leave(peer)

    async def _take_requests(self, peer: _Peer, answers: asyncio.TaskGroup) -> Refusal | None:
        """Answer what is quick as it comes, have the rest answered by tasks."""
        while True:
            asked = await self._next_request(peer)
            if not isinstance(asked, _Asked):
                return asked
            if peer in self._admitted:  # behind all that have asked nothing for longer
                self._admitted[peer] = self._admitted.pop(peer)
            peer.waiting += 1
            if self._workplace.is_quick(asked.request, asked.size):
                self._workplace.answer(asked.request, peer.uid, partial(self._give, asked, peer))
            else:
                answers.create_task(self._answer(asked, peer)).add_done_callback(partial(self._end, asked, peer))
            await asyncio.sleep(0)  # the others' turn, however many requests are here already

    async def _next_request(self, peer: _Peer) -> _Asked | Refusal | None:
        now = asyncio.get_running_loop().time
        try:
            peer.due_at = now() + self._limits.idle_seconds
            prefix = await peer.reader.readexactly(4)
            peer.due_at, peer.is_half = _NEVER, True
            size = frame_size(prefix)
            places = 1 if size > USUAL_FRAME_BYTES else min(_MOST_PLACES, 1 + size // SMALL_FRAME_BYTES)
            for _ in range(places):
                await peer.places.acquire()
            peer.due_at = now() + self._limits.request_seconds
            if size > USUAL_FRAME_BYTES:
                await self._large.enter(peer)
            request = decode_request(await peer.reader.readexactly(size))
            peer.due_at, peer.is_half = _NEVER, False
            self._large.has_come(peer)
            return _Asked(request, size, places)
        except (asyncio.IncompleteReadError, ConnectionError):
            if peer.is_late and peer.is_half:
                return Refusal(0, "policy-deadline", f"half a frame within {self._limits.request_seconds} s")
            return None
        except WireError as error:
            return Refusal(0, "protocol-message", str(error))

    def _give(self, asked: _Asked, peer: _Peer, reply: Reply) -> None:
        """Hand over the reply to a quick request. While the peer does not read it, it has fewer places."""
        peer.given()
        self._tell(reply)
        if peer.writer.transport.is_closing():
            self._end(asked, peer)
            return
        peer.writer.write(encode_frame(reply))
        if peer.writer.transport.get_write_buffer_size():
            peer.draining.add(task := asyncio.get_running_loop().create_task(self._drain(peer)))
            task.add_done_callback(peer.draining.discard)
            task.add_done_callback(partial(self._end, asked, peer))
        else:
            self._end(asked, peer)

    async def _answer(self, asked: _Asked, peer: _Peer) -> None:
        try:
            reply = await self._workplace.reply(asked.request, asked.size, peer.uid)
        finally:
            peer.given()
        self._tell(reply)
        with suppress(ConnectionError):
            peer.writer.write(encode_frame(reply))
        await self._drain(peer)

    async def _drain(self, peer: _Peer) -> None:
        """Wait until the peer has room for more; one that reads nothing is cut off."""
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                await peer.writer.drain()
        except (ConnectionError, TimeoutError):
            peer.writer.transport.abort()

    def _end(self, asked: _Asked, peer: _Peer, _task: asyncio.Task[None] | None = None) -> None:
        """Give back what a request has taken."""
        for _ in range(asked.places):
            peer.places.release()
        if asked.size > USUAL_FRAME_BYTES:
            self._large.free()

    def _tell(self, reply: Reply) -> None:
        """Log what was refused, for people; the audit log has every decision."""
        if isinstance(reply, Refusal) and self._lines.take(time.monotonic()):
            log.warning("refused", tag=reply.tag, reason=reply.reason)

    async def _turn_away(self, peer: _Peer, refusal: Refusal) -> None:
        if self._lines.take(time.monotonic()):
            log.warning("turned away", tag=refusal.tag, reason=refusal.reason)
        if self._leaving >= FAREWELLS:
            return
        self._leaving += 1
        try:
            peer.writer.write(encode_frame(refusal))
            peer.writer.write_eof()
            async with asyncio.timeout(_FAREWELL_SECONDS):
                while await peer.reader.read(4096):
                    pass
        finally:
            self._leaving -= 1


class _Peer:
    """One connection: what it waits for, and until when the next of it must have come."""

    __slots__ = ("_has_all", "draining", "due_at", "is_half", "is_late", "places", "reader", "uid", "waiting", "writer")

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, uid: int) -> None:
        self.reader = reader
        self.writer = writer
        self.uid = uid
        self.waiting = 0
        self.places = asyncio.Semaphore(REQUESTS_IN_FLIGHT)
        self.draining: set[asyncio.Task[None]] = set()
        self.due_at = _NEVER
        self.is_half = self.is_late = False
        self._has_all: asyncio.Event | None = None

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
        self.is_late, self.due_at = True, _NEVER
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio types it as a write transport
        self.reader.feed_eof()


class _Asked(Struct, frozen=True):
    request: Request
    size: int
    places: int


class _LargeFrames:
    """Places for large frames. Who is slow to send its frame gives its place up to others that wait."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(LARGE_FRAMES)
        self._sending: dict[_Peer, float] = {}

    async def enter(self, peer: _Peer) -> None:
        """Wait for a place, or cut off whoever has been sending for too long."""
        now = asyncio.get_running_loop().time
        while self._places.locked():
            slow = next((each for each, begun in self._sending.items() if now() - begun > _LARGE_SECONDS), None)
            if slow is None:
                await asyncio.sleep(_LARGE_SECONDS / 10)
                continue
            del self._sending[slow]
            self.free()
            slow.writer.transport.abort()
        await self._places.acquire()
        self._sending[peer] = now()

    def has_come(self, peer: _Peer) -> None:
        """The frame is here whole; its place stays taken until it was answered."""
        self._sending.pop(peer, None)

    def leave(self, peer: _Peer) -> None:
        """The peer is gone; if its frame did not come whole, its place is free."""
        if peer in self._sending:
            del self._sending[peer]
            self.free()

    def free(self) -> None:
        """A large frame was answered."""
        self._places.release()
