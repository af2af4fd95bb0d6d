"""One client's WebSocket: reads its frames in turns, answers its control frames, and ends in good order or at once.

An asyncio protocol on the connection's socket. What the frames say is the session's (`stream`). Every frame is either
counted by the session, as payments in flight, or counted here against an allowance; reading is bounded by `Turns`, and by
the buffer that the client fills while nothing is read.

However the connection ends, `Session.ended` is called once, and `connection_lost` gives back everything else.
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
"""Frames of one stream that are read before other streams have a turn."""

_MOST_UNREAD_BYTES = 65536
"""What may lie here before the socket is not read any more."""

_HIGH_WATER_BYTES = 65536
"""While more than this waits for the client to take it, nothing of the client's is read."""

_CLOSING_SECONDS = 3.0
"""Time for the client to close too, and to take what was written."""

STRANGERS_FRAMES = 8
"""Frames beside the one message that a client may send before its secret is known."""

STRANGERS_BYTES = 512
"""Size of that message; a secret needs a fifth."""

_FREE_FRAMES, _FREE_FRAMES_A_SECOND = 256, 16
"""Frames without a payment. Pings come once in some seconds; a whole frame of malformed payments is answered once."""

_FRAMES_WHILE_CLOSING = 4096
"""What a client may have sent before it sees that the server closes; more of it is a flood."""

_EARNED_BY_MESSAGE = 16
"""A message of payments may come in as many fragments."""


class Session(Protocol):
    """What the frames are for."""

    @property
    def has_room(self) -> bool:
        """Whether a further message may come now; when that becomes true the session calls `WebSocket.go_on`."""

    def message(self, payload: bytes, *, binary: bool) -> None:
        """Take a message."""

    def turn_over(self) -> None:
        """Use what was taken since the last call."""

    def ended(self) -> None:
        """Give everything back: nothing can be answered any more."""


class WebSocket(asyncio.Protocol):
    """The server's end of one WebSocket."""

    asked = takes_all = False

    def __init__(self, session: Session, turns: Turns, max_message_bytes: int, ping_seconds: float) -> None:
        self._session, self._turns = session, turns
        self._max_message_bytes, self._ping_seconds = max_message_bytes, ping_seconds
        self._reader = FrameReader(STRANGERS_BYTES)
        self._allowance, self._is_stranger = Allowance(STRANGERS_FRAMES, 0, monotonic()), True
        self._transport: Any = None
        self._reads, self._choked = True, False
        self._closing = self._over = self.is_gone = False
        self._pong_due = self._was_full = self._deaf = False
        self._begun = (b"", b"")
        self._timer: asyncio.TimerHandle | None = None
        self.on_lost: Callable[[], object] | None = None
        """Called when the connection has ended."""

    def admit(self) -> None:
        """The client has named the channel's secret: it may send payments."""
        self._reader.max_message_bytes = self._max_message_bytes
        self._allowance, self._is_stranger = Allowance(_FREE_FRAMES, _FREE_FRAMES_A_SECOND, monotonic()), False

    # --- what asyncio calls -----------------------------------------------------------------------------------------

    def begins_with(self, head: bytes, came: bytes) -> None:
        """Set the head of the answer, and what the client sent behind its request."""
        self._begun = head, came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        if self._over:  # ended before it began
            self._transport.abort()
            return
        (head, came), self._begun = self._begun, (b"", b"")
        self._transport.write(head)
        self._timer = asyncio.get_running_loop().call_later(self._ping_seconds, self._ping)
        self.data_received(came)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._reader.feed(data)
        if self._reads and self._reader.unread_bytes > _MOST_UNREAD_BYTES:
            self._reads = False
            self._transport.pause_reading()
        self._turns.ask(self)

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self.go_on()

    def eof_received(self) -> bool:
        """A client that sends nothing more has left: a WebSocket is not used in one direction."""
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

    def go_on(self) -> None:
        """Read on: there is room for more."""
        self._turns.ask(self)

    def work(self, until: float) -> bool:
        """Read some frames, then let the session use them."""
        if self._transport.is_closing() or self._deaf:
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
            came = self._reader.take()
            if came is None:
                self._read_socket()
                return False
            self._handle(*came)
            if monotonic() >= until:
                break
        return True

    def _read_last(self) -> None:
        """Read what came before the connection ended, a turn's frames of it: the payments count, their answers are lost."""
        try:
            if not self._closing:
                self._read(inf)
        except Violation:
            pass  # there is nobody to tell
        except Exception:
            log.exception("stream failed")

    @property
    def _may_read(self) -> bool:
        if not self._session.has_room:
            self._was_full = True
            return False
        return not self._choked

    def _read_socket(self) -> None:
        if not self._reads and not self._transport.is_closing():
            self._reads = True
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
            Violation: there were too many.
        """
        if not self._allowance.spend(frames, monotonic()):
            raise Violation(POLICY, "too many frames without a payment")

    def earn(self) -> None:
        """Count a message of payments."""
        self._allowance.earn(_EARNED_BY_MESSAGE)

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, opcode: int, payload: bytes) -> None:
        """Write a message, unless the WebSocket is closing."""
        if not self._closing:
            self._transport.write(frame(opcode, payload))

    def _ping(self) -> None:
        """Ping, and end a connection that did not answer the last one, unless its answer may wait here to be read."""
        if self._pong_due and not self._was_full:
            self.abort()
            return
        self._pong_due, self._was_full = True, not self._session.has_room
        self._transport.write(frame(PING, b""))
        self._timer = asyncio.get_running_loop().call_later(self._ping_seconds, self._ping)

    # --- ending -----------------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str = "") -> None:
        """Close with a code; what the client sends from now on is not looked at, but for its own close."""
        if not self._closing:
            self._begin_to_close(close_frame(code, reason))
            self.go_on()

    def _fail(self, broken: Violation) -> None:
        """RFC 6455 7.1.7: say why, and read nothing more; the client's bytes are dropped until it has seen that."""
        if self._closing:
            self.abort()
            return
        self._deaf = True
        self._begin_to_close(close_frame(broken.code, broken.reason))
        self._read_socket()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _closed_by_client(self, payload: bytes) -> None:
        """RFC 6455 5.5.1: answer with the same code, unless that frame is the answer to ours; then end the connection."""
        if not self._closing:
            self._begin_to_close(close_frame(read_close(payload)))
        self._transport.close()

    def _begin_to_close(self, last: bytes) -> None:
        self._closing = True
        if not self._is_stranger:
            self._allowance = Allowance(_FRAMES_WHILE_CLOSING, 0, monotonic())
        self._end()
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(last)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_CLOSING_SECONDS, self.abort)

    def abort(self) -> None:
        """End it now."""
        self._closing = True
        self._end()
        if self._transport is not None:
            self._transport.abort()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._session.ended()
