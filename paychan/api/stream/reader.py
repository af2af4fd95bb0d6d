"""One client's WebSocket: reads frames in turns, answers control frames, and closes the connection.

It is an asyncio protocol on the connection's socket. The session (`session`) processes the messages. Every frame is
counted: by the session as payments in flight, or here against an allowance. `Turns` limits the time of reading, and
`_MOST_UNREAD_BYTES` the bytes that are buffered.

However the connection ends, `Session.ended` is called once, and `connection_lost` frees everything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any, Protocol

import structlog

from paychan.api.budgets.turns import Allowance, Turns
from paychan.api.stream.websocket import (
    BINARY,
    CLOSE,
    PING,
    POLICY,
    PONG,
    TEXT,
    FrameReader,
    Violation,
    close_frame,
    frame,
    read_close,
)

log = structlog.get_logger("stream")

_FRAMES_A_TURN = 32
"""Frames of one stream that are read in one turn."""

_MOST_UNREAD_BYTES = 65536
"""Reading from the socket pauses above this number of buffered bytes."""

_HIGH_WATER_BYTES = 65536
"""While more bytes than this wait to be sent to the client, no frame of the client is read."""

_CLOSING_SECONDS = 3.0
"""Time that the client has to answer a close frame and to read the answers."""

UNAUTHENTICATED_FRAMES = 8
"""Frames that a client may send beside its first message, until it has named the secret."""

UNAUTHENTICATED_BYTES = 512
"""Largest first message; one with a secret takes a fifth of this."""

_FREE_FRAMES, _FREE_FRAMES_A_SECOND = 256, 16
"""Frames without a payment: a burst, then a number per second. The burst allows one frame of malformed payments."""

_FRAMES_WHILE_CLOSING = 4096
"""Frames that a client may have sent before it reads the close frame; more is a flood."""

_EARNED_BY_MESSAGE = 16
"""Frames that a message of payments adds to the allowance, because it may arrive in fragments."""


class Session(Protocol):
    """The receiver of the messages."""

    @property
    def has_room(self) -> bool:
        """Whether it accepts a further message now; when this becomes true it calls `WebSocket.resume`."""

    def message(self, payload: bytes, *, binary: bool) -> None:
        """Process a message."""

    def turn_over(self) -> None:
        """Process the messages of this turn together."""

    def ended(self) -> None:
        """Free all resources: no answer can be sent any more."""


class WebSocket(asyncio.Protocol):
    """The server's end of one WebSocket."""

    is_queued = ends_turn = False

    def __init__(self, session: Session, turns: Turns, max_message_bytes: int, ping_seconds: float) -> None:
        self._session, self._turns = session, turns
        self._max_message_bytes, self._ping_seconds = max_message_bytes, ping_seconds
        self._reader = FrameReader(UNAUTHENTICATED_BYTES)
        self._allowance, self._is_authenticated = Allowance(UNAUTHENTICATED_FRAMES, 0, monotonic()), False
        self._transport: Any = None
        self._is_reading, self._is_choked = True, False
        self._closing = self._over = self.is_gone = False
        self._pong_due = self._was_full = self._ignores_input = False
        self._begun = (b"", b"")
        self._timer: asyncio.TimerHandle | None = None
        self.on_lost: Callable[[], object] | None = None
        """Called when the connection has ended."""

    def admit(self) -> None:
        """Allow payments, because the client has named the channel's secret."""
        self._reader.max_message_bytes = self._max_message_bytes
        self._allowance, self._is_authenticated = Allowance(_FREE_FRAMES, _FREE_FRAMES_A_SECOND, monotonic()), True

    # --- what asyncio calls -----------------------------------------------------------------------------------------

    def begins_with(self, head: bytes, unread: bytes) -> None:
        """Set the head of the answer, and the bytes that the client sent after its request."""
        self._begun = head, unread

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        if self._over:  # it was closed before it began
            self._transport.abort()
            return
        (head, unread), self._begun = self._begun, (b"", b"")
        self._transport.write(head)
        self._timer = asyncio.get_running_loop().call_later(self._ping_seconds, self._ping)
        self.data_received(unread)

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            return
        self._reader.feed(data)
        if self._is_reading and self._reader.unread_bytes > _MOST_UNREAD_BYTES:
            self._is_reading = False
            self._transport.pause_reading()
        self._turns.schedule(self)

    def pause_writing(self) -> None:
        self._is_choked = True

    def resume_writing(self) -> None:
        self._is_choked = False
        self.resume()

    def eof_received(self) -> bool:
        """Close the transport: a WebSocket is not used in one direction only."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self._read_last()
        self._closing = self.is_gone = True
        self._end()
        if self._timer is not None:
            self._timer.cancel()
        if self.on_lost is not None:
            on_lost, self.on_lost = self.on_lost, None
            on_lost()

    # --- reading ----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue to read, because there is room for more."""
        self._turns.schedule(self)

    def work(self, until: float) -> bool:
        """Read some frames, then let the session process them."""
        if self._transport.is_closing() or self._ignores_input:
            return False
        try:
            left = self._read(until)
            if not self._closing:
                self._session.turn_over()
        except Violation as broken:
            self._fail(broken)
        except Exception:
            log.exception("stream failed")
            self.abort()
        else:
            return left
        return False

    def _read(self, until: float) -> bool:
        for _ in range(_FRAMES_A_TURN):
            if not (self._closing or self._may_read):
                return False
            message = self._reader.take()
            if message is None:
                self._read_socket()
                return False
            self._handle(*message)
            if monotonic() >= until:
                break
        return True

    def _read_last(self) -> None:
        """Read at most one turn's frames after the connection has ended: their payments count, but get no answer."""
        try:
            if not self._closing:
                self._read(inf)
        except Violation:
            pass  # the client can't be informed any more
        except Exception:
            log.exception("stream failed")

    @property
    def _may_read(self) -> bool:
        if not self._session.has_room:
            self._was_full = True
            return False
        return not self._is_choked

    def _read_socket(self) -> None:
        if not self._is_reading and not self._transport.is_closing():
            self._is_reading = True
            self._transport.resume_reading()

    def _handle(self, opcode: int, payload: bytes) -> None:
        if opcode in (BINARY, TEXT):
            if self._closing:
                self.spend(1)
            else:
                self._session.message(payload, binary=opcode == BINARY)
            return
        if opcode == CLOSE:
            self._closed_by_client(payload)
            return
        self.spend(1)
        if opcode == PING and not self._closing:
            self._transport.write(frame(PONG, payload))
        elif opcode == PONG:
            self._pong_due = False

    def spend(self, frames: int) -> None:
        """Count frames without a payment.

        Raises:
            Violation: the client has sent too many.
        """
        if not self._allowance.spend(frames, monotonic()):
            raise Violation(POLICY, "too many frames without a payment")

    def earn(self) -> None:
        """Count a message of payments, which adds to the allowance."""
        self._allowance.earn(_EARNED_BY_MESSAGE)

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, opcode: int, payload: bytes) -> None:
        """Write a message, unless the WebSocket is closing."""
        if not self._closing:
            self._transport.write(frame(opcode, payload))

    def _ping(self) -> None:
        """Send a ping; end the connection if the last ping has no answer, unless reading was paused since then."""
        if self._pong_due and not self._was_full:
            self.abort()
            return
        self._pong_due, self._was_full = True, not self._session.has_room
        self._transport.write(frame(PING, b""))
        self._timer = asyncio.get_running_loop().call_later(self._ping_seconds, self._ping)

    # --- ending -----------------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str = "") -> None:
        """Close with a code; from now on all frames of the client but its close frame are ignored."""
        if not self._closing:
            self._begin_to_close(close_frame(code, reason))
            self.resume()

    def _fail(self, broken: Violation) -> None:
        """Fail the connection (RFC 6455 7.1.7): send the reason, then discard the client's bytes until it closes."""
        if self._closing:
            self.abort()
            return
        self._ignores_input = True
        self._begin_to_close(close_frame(broken.code, broken.reason))
        self._read_socket()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _closed_by_client(self, payload: bytes) -> None:
        """Answer a close frame with its code (RFC 6455 5.5.1), unless it is itself the answer.

        Then close the connection.
        """
        if not self._closing:
            self._begin_to_close(close_frame(read_close(payload)))
        self._transport.close()

    def _begin_to_close(self, last: bytes) -> None:
        self._closing = True
        if self._is_authenticated:
            self._allowance = Allowance(_FRAMES_WHILE_CLOSING, 0, monotonic())
        self._end()
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(last)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_CLOSING_SECONDS, self.abort)

    def abort(self) -> None:
        """Close the connection at once."""
        self._closing = True
        self._end()
        if self._transport is not None:
            self._transport.abort()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._session.ended()
