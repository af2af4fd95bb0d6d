"""Connections of the signer's socket: bytes in, requests out, replies in within the time limit; no peer delays others.

All memory that a peer can occupy is bounded, whatever it sends or does not read. When all slots are in use, the
connection that has been idle longest is closed, even in the middle of a frame, so the server gets a slot during any
flood of connections. A peer that sends no valid request gets the reason, with request id 0, and its connection ends.

The event loop calls a `Connection`, which hands each whole request to `Connections`. Input that can't be processed yet
stays in the socket, and the kernel stops the peer. A request that was begun is answered even if nothing more can be read.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import structlog
from msgspec import Struct

from paychan.protocol.wire.signer_messages import (
    MAX_FRAME_BYTES,
    Refusal,
    Reply,
    Request,
    WireError,
    decode_request,
    encode_frame,
    frame_size,
)
from signer import vital
from signer.judge.rate import Budget
from signer.server.socket_file import peer_uid

FAREWELLS = 64
"""Most refused connections that get the reason at the same time; further ones are closed without a reply."""

LINES_PER_SECOND = 1
"""Refusals that go to the log; the log must not fill the disk. The audit log has its own limit."""

_ACCEPT_PAUSE_SECONDS = 0.1

REQUESTS_IN_FLIGHT = 32
"""Requests of one connection that are answered at the same time."""

BYTES_IN_FLIGHT = MAX_FRAME_BYTES
"""Size of the frames of these requests at which no further one is begun."""

NEVER = float("inf")

FAREWELL_SECONDS = 1.0
"""Closing a socket with unread input discards replies in transit, so the signer first reads for this time."""

_PREFIX_BYTES = 4

_BUFFER_BYTES = 16 * 1024
"""Input buffer; it grows for a larger frame only. A peer that leaves this much of its replies unread must catch up."""

_PASSING = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC),
    *(errno.ECONNABORTED, errno.ECONNRESET, errno.EINTR, errno.EPROTO),
}
"""The kernel has no descriptor or no memory for a connection, or the connection has ended. The listener still works."""

Handle: TypeAlias = Callable[[Request, int], Awaitable[Reply]]
"""Answers a request of a peer with this user: `handler.Handler.handle`."""

log = structlog.get_logger()


class Limits(Struct, frozen=True):
    """Users that are served, and the time limits of each connection."""

    allowed_uids: frozenset[int]
    request_seconds: float
    idle_seconds: float
    max_connections: int


class Connection(asyncio.BufferedProtocol):
    """A connection of a peer with this user."""

    def __init__(self, host: Connections, uid: int, request_seconds: float, idle_seconds: float) -> None:
        self.uid = uid
        self.in_flight = 0
        """Requests that wait for their reply."""
        self._host = host
        self._request_seconds = request_seconds
        self._idle_seconds = idle_seconds
        self._now = asyncio.get_running_loop().time
        self._buffer = bytearray(_BUFFER_BYTES)
        self._begin = self._filled = 0
        self._frame_bytes = 0
        """Size of the frame that is arriving; 0: its prefix is not complete."""
        self._bytes_in_flight = 0
        self._due_at = self._unread_since = NEVER
        self._is_paused = self._is_stopped = False
        self._reason: Refusal | None = None

    # --- called by the event loop -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # for mypy: the transport of a socket is one
        self.transport = transport
        transport.set_write_buffer_limits(_BUFFER_BYTES)
        self._due_at = self._now() + self._idle_seconds
        self._host.admit(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - any size is allowed
        """Return the free part of the buffer. `_make_space` has seen to it that there is one."""
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Process input, or discard it if nothing more is to be read."""
        self._filled = 0 if self._is_stopped else self._filled + nbytes
        self._go_on()

    def eof_received(self) -> bool:
        """Stop; return True to keep the connection for replies that are still to come."""
        self.stop(None)
        return self.in_flight > 0

    def pause_writing(self) -> None:
        self._unread_since = self._now()

    def resume_writing(self) -> None:
        self._unread_since = NEVER
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason changes nothing
        self._is_stopped, self._due_at, self._unread_since = True, NEVER, NEVER
        self._host.forget(self)

    # --- called by the host -----------------------------------------------------------------------------------------

    def reply(self, reply: Reply, size: int) -> None:
        """Send the reply to a request in a frame of this size, and go on with waiting input."""
        self.in_flight -= 1
        self._bytes_in_flight -= size
        if self.transport.is_closing():
            return
        self.transport.write(encode_frame(reply))
        if self._is_paused:
            self._go_on()
        if self._is_stopped:
            self._end_if_answered()

    def stop(self, reason: Refusal | None) -> None:
        """Read no further request; after the replies, give the reason if there is one, and close."""
        if self._is_stopped:
            return
        self._is_stopped, self._reason, self._due_at = True, reason, NEVER
        self._begin = self._filled = 0
        self._end_if_answered()

    def end_late(self, now: float) -> None:
        """Disconnect a peer that leaves its replies unread, stop one whose input is late."""
        if now - self._unread_since > self._request_seconds:
            self.transport.abort()
        elif self._due_at < now:
            late = Refusal(0, "policy-deadline", f"half a frame within {self._request_seconds} s")
            self.stop(late if self._frame_bytes else None)

    def say_goodbye(self, reason: Refusal) -> None:
        """Send the last reply. Input is discarded until the peer closes, for a limited time."""
        self.transport.write(encode_frame(reason))
        self.transport.write_eof()
        self.transport.resume_reading()
        asyncio.get_running_loop().call_later(FAREWELL_SECONDS, self.transport.abort)

    # --- frames -----------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Begin the requests in the buffer, up to the limits on requests in flight."""
        try:
            while not self._is_stopped and self._may_begin() and self._has_whole_frame():
                begin = self._begin + _PREFIX_BYTES
                size, self._frame_bytes = self._frame_bytes, 0
                self._begin = begin + size
                request = decode_request(bytes(self._buffer[begin : self._begin]))
                self.in_flight += 1
                self._bytes_in_flight += size
                self._host.answer(self, request, size)
        except WireError as error:
            self.stop(Refusal(0, "protocol-message", str(error)))

    def _may_begin(self) -> bool:
        """Say whether one more request may be begun; reading is paused for as long as the answer is no."""
        may = (
            self.in_flight < REQUESTS_IN_FLIGHT
            and self._bytes_in_flight < BYTES_IN_FLIGHT
            and self._unread_since == NEVER
        )
        if may is self._is_paused:
            self._is_paused = not may
            if may:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()
                self._due_at = NEVER
        return may

    def _has_whole_frame(self) -> bool:
        """Say whether a frame is complete; if not, make space for its rest, and set its deadline. Raises `WireError`."""
        there = self._filled - self._begin
        if not self._frame_bytes and there >= _PREFIX_BYTES:
            self._frame_bytes = frame_size(bytes(self._buffer[self._begin : self._begin + _PREFIX_BYTES]))
            self._due_at = NEVER
        if not self._frame_bytes:
            self._due_at = self._now() + self._idle_seconds
            self._make_space(_BUFFER_BYTES)
            return False
        need = _PREFIX_BYTES + self._frame_bytes
        if there >= need:
            return True
        if self._due_at == NEVER:
            self._due_at = self._now() + self._request_seconds
        self._make_space(max(need, _BUFFER_BYTES))
        return False

    def _make_space(self, size: int) -> None:
        """Move the unread input to the beginning of a buffer of this size, which is more than there is of it."""
        there = self._filled - self._begin
        if len(self._buffer) != size:
            old, self._buffer = memoryview(self._buffer), bytearray(size)
            self._buffer[:there] = old[self._begin : self._filled]
        elif self._begin and there:
            self._buffer[:there] = self._buffer[self._begin : self._filled]
        self._begin, self._filled = 0, there

    def _end_if_answered(self) -> None:
        if self.in_flight or self.transport.is_closing():
            return
        if self._reason is not None:
            self._host.turn_away(self, self._reason)
            return
        self.transport.close()
        if self.transport.get_write_buffer_size():  # a peer that reads nothing must not keep it open
            asyncio.get_running_loop().call_later(FAREWELL_SECONDS, self.transport.abort)


class Connections:
    """Serves the connections of one socket."""

    def __init__(self, handle: Handle, limits: Limits) -> None:
        self._handle = handle
        self._limits = limits
        self._admitted: dict[Connection, None] = {}
        """The connection that has been idle longest comes first."""
        self._leaving: set[Connection] = set()
        self._deadlines: dict[asyncio.Task[Any] | None, float] = {}
        """The tasks that answer a request, and the time of the event loop by which each must end."""
        self._lines = Budget(LINES_PER_SECOND, time.monotonic())

    async def accept(self, listener: socket.socket) -> None:
        """Serve connections until cancelled; then all connections end.

        Further connections wait in the listener's queue, in order. Between two of them the event loop serves the
        existing ones: a peer that has sent a request gets the answer before enough others arrive to displace it.
        """
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            ending = False
            late = tasks.create_task(self._end_late())
            vital.watch("late requests", late, lambda: ending)
            try:
                await self._let_in(listener)
            finally:
                ending = True
                late.cancel()
                self._end_all()

    async def _let_in(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
                await self._begin(accepted)
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                if self._lines.take(time.monotonic()):
                    log.error("can't accept", reason=error.strerror, connections=len(self._admitted))  # noqa: TRY400
                await asyncio.sleep(0 if self._make_room() else _ACCEPT_PAUSE_SECONDS)

    async def _begin(self, accepted: socket.socket) -> None:
        """Attach the event loop to a connection. Raises OSError."""
        loop, limits = asyncio.get_running_loop(), self._limits
        try:
            connection = Connection(self, peer_uid(accepted), limits.request_seconds, limits.idle_seconds)
            await loop.connect_accepted_socket(lambda: connection, accepted)
        except BaseException:
            accepted.close()
            raise

    async def _end_late(self) -> None:
        """Look for late requests at intervals until cancelled: a timer for each request would cost more than a look."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(self._limits.request_seconds, self._limits.idle_seconds) / 10)
            for task in [task for task, deadline in self._deadlines.items() if task and deadline < now()]:
                task.cancel()
            for connection in [*self._admitted]:
                connection.end_late(now())

    def _end_all(self) -> None:
        for connection in (*self._admitted, *self._leaving):
            connection.transport.abort()
        for task in self._deadlines:
            if task:
                task.cancel()

    # --- called by the connections ----------------------------------------------------------------------------------

    def admit(self, connection: Connection) -> None:
        """Admit a peer if its user is allowed, and there is a free slot or one can be freed."""
        if connection.uid not in self._limits.allowed_uids:
            connection.stop(Refusal(0, "policy-peer", f"uid {connection.uid} is not in socket.allowed_uids"))
        elif len(self._admitted) >= self._limits.max_connections and not self._make_room():
            connection.stop(Refusal(0, "protocol-busy", f"{len(self._admitted)} connections are open and busy"))
        else:
            self._admitted[connection] = None

    def _make_room(self) -> bool:
        """Close the connection that has been idle longest; return False if all wait for an answer."""
        idle = next((connection for connection in self._admitted if not connection.in_flight), None)
        if idle is None:
            return False
        del self._admitted[idle]
        idle.transport.abort()
        return True

    def answer(self, connection: Connection, request: Request, size: int) -> None:
        """Answer a request, beside those that wait for the disk or for a token."""
        if connection in self._admitted:
            self._admitted[connection] = self._admitted.pop(connection)  # it was idle less long than all others
        asyncio.get_running_loop().create_task(self._answer(connection, request, size))

    async def _answer(self, connection: Connection, request: Request, size: int) -> None:
        seconds, task = self._limits.request_seconds, asyncio.current_task()
        self._deadlines[task] = asyncio.get_running_loop().time() + seconds
        try:
            reply = await self._handle(request, connection.uid)
        except asyncio.CancelledError:
            reply = Refusal(request.id, "policy-deadline", f"not done within {seconds} s")
        except Exception as error:  # noqa: BLE001 - a bug must neither end the signer nor show request data
            vital.tell_bug(error)
            reply = Refusal(request.id, "protocol-internal", "the signer failed")
        finally:
            del self._deadlines[task]
        if isinstance(reply, Refusal) and self._lines.take(time.monotonic()):
            log.warning("refused", tag=reply.tag, reason=reply.reason)  # the audit log has every decision
        connection.reply(reply, size)

    def turn_away(self, connection: Connection, refusal: Refusal) -> None:
        """Give a peer the reason for which its connection ends; only log and close if many are being told."""
        if self._lines.take(time.monotonic()):
            log.warning("turned away", tag=refusal.tag, reason=refusal.reason)
        self._admitted.pop(connection, None)
        if len(self._leaving) >= FAREWELLS:
            connection.transport.abort()
            return
        self._leaving.add(connection)
        connection.say_goodbye(refusal)

    def forget(self, connection: Connection) -> None:
        """Forget a closed connection; the replies to its requests are dropped."""
        self._admitted.pop(connection, None)
        self._leaving.discard(connection)
