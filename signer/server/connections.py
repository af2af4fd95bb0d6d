"""Connections of the signer's socket: requests in, replies out; no peer can delay the others.

All memory that a peer can occupy is bounded, whatever it sends or does not read. When all slots are in use, the
connection that has been idle longest is closed, even in the middle of a frame, so the server gets a slot during any
flood of connections. A peer that sends no valid request gets the reason, with request id 0, and its connection ends.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import time
from contextlib import suppress
from functools import partial

import structlog
from msgspec import Struct

from paychan.protocol.wire.signer_messages import (
    USUAL_FRAME_BYTES,
    Refusal,
    Reply,
    WireError,
    decode_request,
    encode_frame,
    frame_size,
)
from signer import vital
from signer.judge.rate import Budget
from signer.server.peer import NEVER, Asked, LargeFrames, Peer, open_peer
from signer.server.scheduling import SMALL_FRAME_BYTES, RequestHandler, Scheduler, tell_bug
from signer.server.socket_file import peer_uid

_MOST_PLACES = 8

FAREWELLS = 64
"""Most refused connections that get the reason at the same time; further ones are closed without a reply."""

LINES_PER_SECOND = 1
"""Refusals that go to the log; the log must not fill the disk. The audit log has its own limit."""

_FAREWELL_SECONDS = 1.0
"""Closing a socket with unread input discards replies in transit, so the signer first reads for this time."""

_ACCEPT_PAUSE_SECONDS = 0.1

_ENDED_AT_ONCE = 64
"""Number of ended connections after which their memory is collected."""

_PASSING = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR, errno.EPROTO)
)
"""The kernel has no descriptor or no memory for a connection, or the connection has ended. The listener still works."""

log = structlog.get_logger()


class Limits(Struct, frozen=True):
    """Users that are served, and the time limits of each connection."""

    allowed_uids: frozenset[int]
    request_seconds: float
    idle_seconds: float
    max_connections: int


class Connections:
    """Serves the connections of one socket."""

    def __init__(self, handler: RequestHandler, limits: Limits) -> None:
        self._scheduler = Scheduler(handler, limits.request_seconds)
        self._limits = limits
        self._admitted: dict[Peer, None] = {}
        """The connection that has been idle longest comes first."""
        self._large = LargeFrames()
        self._leaving = self._ended = 0
        self._lines = Budget(LINES_PER_SECOND, time.monotonic())

    async def accept(self, listener: socket.socket) -> None:
        """Serve connections until cancelled; then all connections end.

        After each accepted connection the existing ones get a turn, so that a peer that has sent a request gets the
        answer before enough others arrive to displace it. Further connections wait in the listener's queue, in order.
        """
        listener.setblocking(False)
        self._scheduler.prepare()
        async with asyncio.TaskGroup() as conversations:
            ending = False
            vital.watch("late requests", conversations.create_task(self._end_late()), lambda: ending)
            try:
                await self._let_in(listener, conversations)
            finally:
                ending = True

    async def _let_in(self, listener: socket.socket, conversations: asyncio.TaskGroup) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                if self._lines.take(time.monotonic()):
                    log.error("can't accept", reason=error.strerror, connections=len(self._admitted))  # noqa: TRY400
                await asyncio.sleep(0 if self._make_room() else _ACCEPT_PAUSE_SECONDS)
                continue
            conversations.create_task(self._serve(connection))
            await asyncio.sleep(0)  # let the others run: `sock_accept` does not wait while a connection is queued

    async def _end_late(self) -> None:
        """Look for late requests at intervals, for ever: a timer for each request would cost more than judging it."""
        while True:
            await asyncio.sleep(min(self._limits.request_seconds, self._limits.idle_seconds) / 10)
            now = asyncio.get_running_loop().time()
            self._scheduler.end_late(now)
            for peer in [peer for peer in self._admitted if peer.due_at < now]:
                peer.end_reading()

    async def _serve(self, connection: socket.socket) -> None:
        """Answer the requests of one connection until it ends. A failure affects this connection only."""
        with connection:
            try:
                uid = peer_uid(connection)
                peer = await open_peer(connection, uid)
                writer = peer.writer
            except OSError:
                return
            try:
                with suppress(ConnectionError, TimeoutError):
                    refusal = self._admission(peer) or await self._converse(peer)
                    if refusal is not None:
                        await self._turn_away(peer, refusal)
                    writer.close()
                    async with asyncio.timeout(_FAREWELL_SECONDS):
                        await writer.wait_closed()  # let replies that are being sent arrive
            except Exception as error:  # noqa: BLE001 - must not end the other connections
                tell_bug(error)
            finally:
                writer.transport.abort()
                self._clear_up()

    def _clear_up(self) -> None:
        """Collect garbage after many connections: asyncio leaves each in a reference cycle, with all its input."""
        self._ended += 1
        if self._ended % _ENDED_AT_ONCE == 0:
            gc.collect()

    def _admission(self, peer: Peer) -> Refusal | None:
        """Admit a peer if its user is allowed and there is a free slot or one can be freed."""
        if peer.uid not in self._limits.allowed_uids:
            return Refusal(0, "policy-peer", f"uid {peer.uid} is not in socket.allowed_uids")
        if len(self._admitted) >= self._limits.max_connections and not self._make_room():
            return Refusal(0, "protocol-busy", f"{len(self._admitted)} connections are open and busy")
        return None

    def _make_room(self) -> bool:
        """Close the connection that has been idle longest; return False if all wait for an answer."""
        quiet = next((peer for peer in self._admitted if not peer.waiting), None)
        if quiet is None:
            return False
        del self._admitted[quiet]
        quiet.writer.transport.abort()
        return True

    async def _converse(self, peer: Peer) -> Refusal | None:
        """Answer requests until the peer ends the connection (None), or sends an invalid request."""
        self._admitted[peer] = None
        peer.stream.shortcut = partial(self._take_at_once, peer)
        try:
            async with asyncio.TaskGroup() as answers:
                end = await self._take_requests(peer, answers)
            await peer.has_all()
            return end
        finally:
            self._admitted.pop(peer, None)
            self._large.leave(peer)

    async def _take_requests(self, peer: Peer, answers: asyncio.TaskGroup) -> Refusal | None:
        """Answer quick requests in order, and start a task for each other one.

        Requests that a disconnected peer has left in the buffer, perhaps thousands, are not answered: no peer reads the
        replies, and other peers would wait.
        """
        while not peer.writer.transport.is_closing():
            asked = await self._next_request(peer)
            if not isinstance(asked, Asked):
                return asked
            self._note(peer)
            if self._scheduler.is_quick(asked.request, asked.size):
                self._scheduler.answer(asked.request, peer.uid, partial(self._give, asked, peer))
            else:
                answers.create_task(self._answer(asked, peer)).add_done_callback(partial(self._end, asked, peer))
            await asyncio.sleep(0)  # let the others run, however many requests are buffered
        return None

    def _take_at_once(self, peer: Peer, data: bytes) -> bool:
        """Answer a quick request that arrived whole and alone: waking the peer's task would take as long.

        Return False for any other input; the peer's task then reads it.
        """
        if not peer.is_at_rest or peer.waiting or peer.draining or len(data) > SMALL_FRAME_BYTES:
            return False
        try:
            size = frame_size(data[:4])
            request = decode_request(data[4:]) if size == len(data) - 4 else None
        except WireError:
            return False
        if request is None or not self._scheduler.is_quick(request, size):
            return False
        self._note(peer)
        peer.due_at = asyncio.get_running_loop().time() + self._limits.idle_seconds
        self._scheduler.answer(request, peer.uid, partial(self._give, Asked(request, size, 0), peer))
        return True

    def _note(self, peer: Peer) -> None:
        """Count a request of this peer as unanswered, and move the peer to the end of the idle order."""
        if peer in self._admitted:
            self._admitted[peer] = self._admitted.pop(peer)
        peer.waiting += 1

    async def _next_request(self, peer: Peer) -> Asked | Refusal | None:
        now = asyncio.get_running_loop().time
        try:
            peer.due_at = now() + self._limits.idle_seconds
            peer.is_between = True
            prefix = await peer.reader.readexactly(4)
            peer.is_between = False
            peer.due_at, peer.is_half = NEVER, True
            size = frame_size(prefix)
            places = 1 if size > USUAL_FRAME_BYTES else min(_MOST_PLACES, 1 + size // SMALL_FRAME_BYTES)
            for _ in range(places):
                await peer.places.acquire()
            peer.due_at = now() + self._limits.request_seconds
            if size > USUAL_FRAME_BYTES:
                await self._large.enter(peer)
            request = decode_request(await peer.reader.readexactly(size))
            peer.due_at, peer.is_half = NEVER, False
            self._large.has_come(peer)
            return Asked(request, size, places)
        except (asyncio.IncompleteReadError, ConnectionError):
            peer.is_between = False
            if peer.is_late and peer.is_half:
                return Refusal(0, "policy-deadline", f"half a frame within {self._limits.request_seconds} s")
            return None
        except WireError as error:
            return Refusal(0, "protocol-message", str(error))

    def _give(self, asked: Asked, peer: Peer, reply: Reply) -> None:
        """Send the reply to a quick request. While the peer does not read it, fewer of its requests are accepted."""
        peer.answered()
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

    async def _answer(self, asked: Asked, peer: Peer) -> None:
        try:
            reply = await self._scheduler.reply(asked.request, asked.size, peer.uid)
        finally:
            peer.answered()
        self._tell(reply)
        with suppress(ConnectionError):
            peer.writer.write(encode_frame(reply))
        await self._drain(peer)

    async def _drain(self, peer: Peer) -> None:
        """Wait until the peer has room for more; a peer that reads nothing is disconnected."""
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                await peer.writer.drain()
        except (ConnectionError, TimeoutError):
            peer.writer.transport.abort()

    def _end(self, asked: Asked, peer: Peer, _task: asyncio.Task[None] | None = None) -> None:
        """Release the slots of a request."""
        for _ in range(asked.places):
            peer.places.release()
        if asked.size > USUAL_FRAME_BYTES:
            self._large.free()

    def _tell(self, reply: Reply) -> None:
        """Log a refusal for the operator; the audit log has every decision."""
        if isinstance(reply, Refusal) and self._lines.take(time.monotonic()):
            log.warning("refused", tag=reply.tag, reason=reply.reason)

    async def _turn_away(self, peer: Peer, refusal: Refusal) -> None:
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
