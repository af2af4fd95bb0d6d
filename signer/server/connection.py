"""One connection of the signer's socket: bytes in, requests out, replies in; all of it bounded.

The event loop calls a `Connection`; it hands each whole request to its `Host`. Input that can't be processed yet stays
in the socket, and the kernel stops the peer. A request that was begun is answered even if nothing more can be read.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

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


class Host(Protocol):
    """Serves all connections: `connections.Connections`."""

    def admit(self, connection: Connection) -> None:
        """Decide whether to serve a new connection."""

    def answer(self, connection: Connection, request: Request, size: int) -> None:
        """Begin to answer a request in a frame of this size; `Connection.reply` ends it."""

    def turn_away(self, connection: Connection, refusal: Refusal) -> None:
        """End a connection for this reason; all its requests are answered."""

    def forget(self, connection: Connection) -> None:
        """Forget a closed connection."""


class Connection(asyncio.BufferedProtocol):
    """A connection of a peer with this user."""

    def __init__(self, host: Host, uid: int, request_seconds: float, idle_seconds: float) -> None:
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
