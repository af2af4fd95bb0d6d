"""WebSocket frames of a server (RFC 6455), as functions of bytes, without socket and clock.

`FrameReader` takes bytes in pieces of any size and returns complete messages, fragments and control frames. It never
copies unread bytes, so its cost depends on the number of bytes, not on the number of frames. It supports no extensions.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping
from hashlib import sha1

from tornado.util import _websocket_mask

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
"""Opcodes."""

NORMAL, GOING_AWAY, PROTOCOL_ERROR, BAD_TEXT, POLICY, TOO_BIG = 1000, 1001, 1002, 1007, 1008, 1009
"""Close codes (RFC 6455 7.4.1)."""

MAX_CONTROL_BYTES = 125
VERSION = "13"

_FINAL, _OPCODE, _RESERVED = 0x80, 0x0F, 0x70
_MASKED, _SIZE, _SIZE_IN_2 = 0x80, 0x7F, 126
_CONTROL = 0x08
_WHOLE = frozenset((_FINAL | TEXT, _FINAL | BINARY))
"""First bytes of a message that consists of one frame."""

_KNOWN_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))
_ACCEPT_SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES = 16


class Violation(Exception):
    """The client violated the protocol or a limit; `code` is the close code for it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class FrameReader:
    """Reads the frames of one client."""

    __slots__ = ("_at", "_buffer", "_fragments", "_kind", "_size", "max_message_bytes")

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self._buffer, self._at = bytearray(), 0
        self._kind = CONTINUATION
        """Opcode of an incomplete message in fragments; CONTINUATION: there is none."""
        self._fragments: list[bytes] = []
        self._size = 0

    @property
    def unread_bytes(self) -> int:
        """Number of bytes that were fed and not read yet."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes) -> None:
        """Append bytes to the buffer."""
        if self._at:
            del self._buffer[: self._at]  # moves no bytes: a bytearray only advances its start
            self._at = 0
        self._buffer += data

    def take(self) -> tuple[int, bytes] | None:
        """Return opcode and payload of the next message or control frame; None if it is incomplete.

        The opcode CONTINUATION means a fragment that does not complete a message; its payload is kept for the message.

        Raises:
            Violation: the protocol or a limit is violated; raised as soon as the bytes show it.
        """
        buffer, at = self._buffer, self._at
        have = len(buffer) - at
        if have < 2:
            return None
        first, second = buffer[at], buffer[at + 1]
        if first not in _WHOLE or self._kind:
            self._check_first(first)
        if not second & _MASKED:  # RFC 6455 5.1: "The server MUST close the connection"
            raise Violation(PROTOCOL_ERROR, "frame is not masked")
        size, start = second & _SIZE, at + 2
        if size > MAX_CONTROL_BYTES:
            wide = 2 if size == _SIZE_IN_2 else 8
            if first & _CONTROL:
                raise Violation(PROTOCOL_ERROR, "control frame is too long")
            if have < 2 + wide:
                return None
            size, start = _long_size(buffer[start : start + wide]), start + wide
        if self._size + size > self.max_message_bytes and not first & _CONTROL:
            raise Violation(TOO_BIG, "message is too big")
        end = start + 4 + size
        if len(buffer) < end:
            return None
        self._at = end
        payload = _websocket_mask(bytes(buffer[start : start + 4]), bytes(buffer[start + 4 : end])) if size else b""
        return self._message(first, payload)

    def _check_first(self, first: int) -> None:
        """Check the first byte of a frame. Raises `Violation`."""
        opcode = first & _OPCODE
        if first & _RESERVED:
            raise Violation(PROTOCOL_ERROR, "reserved bit is set")
        if opcode in (CLOSE, PING, PONG):
            if not first & _FINAL:
                raise Violation(PROTOCOL_ERROR, "control frame is fragmented")
        elif opcode == CONTINUATION:
            if not self._kind:
                raise Violation(PROTOCOL_ERROR, "nothing to continue")
        elif opcode not in (TEXT, BINARY):
            raise Violation(PROTOCOL_ERROR, "unknown opcode")
        elif self._kind:
            raise Violation(PROTOCOL_ERROR, "message in the middle of another")

    def _message(self, first: int, payload: bytes) -> tuple[int, bytes]:
        """Return the message that this frame completes, or a control frame; keep a fragment."""
        opcode = first & _OPCODE
        if opcode & _CONTROL:
            return opcode, payload
        if not first & _FINAL:
            if not payload:
                raise Violation(POLICY, "empty fragment")
            self._kind = opcode or self._kind
            self._fragments.append(payload)
            self._size += len(payload)
            return CONTINUATION, b""
        if self._kind:
            opcode, payload = self._kind, b"".join((*self._fragments, payload))
            self._kind, self._fragments, self._size = CONTINUATION, [], 0
        if opcode == TEXT:
            _check_text(payload)
        return opcode, payload


def _long_size(raw: bytes | bytearray) -> int:
    """Read a payload length of 2 or 8 bytes. Raises `Violation`."""
    size = int.from_bytes(raw)
    # RFC 6455 5.2: "the minimal number of bytes MUST be used"; "the most significant bit MUST be 0"
    if size <= MAX_CONTROL_BYTES or (len(raw) > 2 and size < 65536) or size >> 63:
        raise Violation(PROTOCOL_ERROR, "length is not in its shortest form")
    return size


def _check_text(payload: bytes) -> None:
    try:
        payload.decode()
    except UnicodeDecodeError:  # RFC 6455 8.1
        raise Violation(BAD_TEXT, "text is not UTF-8") from None


def frame(opcode: int, payload: bytes) -> bytes:
    """Build a frame, without a mask, as a server sends it (RFC 6455 5.1)."""
    size = len(payload)
    if size <= MAX_CONTROL_BYTES:
        return bytes((_FINAL | opcode, size)) + payload
    if size < 65536:
        return bytes((_FINAL | opcode, 126)) + size.to_bytes(2) + payload
    return bytes((_FINAL | opcode, 127)) + size.to_bytes(8) + payload


def close_frame(code: int | None, reason: str = "") -> bytes:
    """Build a close frame; without a code it is empty, as 1005 must not be sent (RFC 6455 7.4.1)."""
    payload = b"" if code is None else code.to_bytes(2) + reason.encode()[: MAX_CONTROL_BYTES - 2]
    return frame(CLOSE, payload)


def read_close(payload: bytes) -> int | None:
    """Return the code of a client's close frame, or None if it has none.

    Raises:
        Violation: the code must not be sent, is incomplete, or the reason is not UTF-8.
    """
    if not payload:
        return None
    code = int.from_bytes(payload[:2])
    if len(payload) < 2 or not (code in _KNOWN_CODES or 3000 <= code <= 4999):
        raise Violation(PROTOCOL_ERROR, "close code is not allowed")
    _check_text(payload[2:])
    return code


def upgrade_problem(headers: Mapping[str, str]) -> str | None:
    """Return why a request does not open a WebSocket (RFC 6455 4.2.1) as "field: reason", or None if it does."""
    if "websocket" not in _tokens(headers.get("Upgrade", "")):
        return "Upgrade: want websocket"
    if "upgrade" not in _tokens(headers.get("Connection", "")):
        return "Connection: want Upgrade"
    if headers.get("Sec-WebSocket-Version", "").strip() != VERSION:
        return f"Sec-WebSocket-Version: want {VERSION}"
    try:
        key = b64decode(headers.get("Sec-WebSocket-Key", "").strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    return None if len(key) == _KEY_BYTES else f"Sec-WebSocket-Key: want {_KEY_BYTES} bytes in base64"


def accept_head(key: str) -> bytes:
    """Build the answer that opens a WebSocket (RFC 6455 4.2.2)."""
    accept = b64encode(sha1(key.strip().encode() + _ACCEPT_SUFFIX, usedforsecurity=False).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nServer: paychan\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def _tokens(value: str) -> list[str]:
    return [token.strip().lower() for token in value.split(",")]
