"""The client side of a payment stream: a channel opened by HTTP, frames over a real WebSocket."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from paychan.protocol.payment import Payment
from paychan.protocol.wire.payment_frames import Said, Taken, read_answers, write_payments
from tests.api.wire import connect as connect_raw
from tests.api.wire import read_all
from tests.lib.rbpcp import V2


def stream_url(client: V2, secret: str | None = None) -> str:
    return client.resource("/stream", secret).replace("http", "ws", 1)


def open_stream(client: V2, **options: Any) -> ClientConnection:
    """Connect with the secret in the query."""
    return connect(stream_url(client), proxy=None, compression=None, **options)


def pay_frame(stream: ClientConnection, payments: Sequence[Payment]) -> list[Taken | Said]:
    """Send one binary frame, and return its answers."""
    stream.send(write_payments(payments))
    return answers(stream, len(payments))


def answers(stream: ClientConnection, count: int) -> list[Taken | Said]:
    """Receive `count` binary answers, in any number of frames."""
    found: list[Taken | Said] = []
    while len(found) < count:
        frame = stream.recv(timeout=10)
        assert isinstance(frame, bytes)
        found += read_answers(frame)
    return found


def code(answer: Taken | Said) -> tuple[int, str]:
    """Return status and error code of a refusal."""
    assert isinstance(answer, Said), answer
    return answer.status, msgspec.json.decode(answer.body)["code"]


def closed(stream: ClientConnection) -> tuple[int, str]:
    """Wait until the server closes; return its close code and reason."""
    with pytest.raises(ConnectionClosed) as end:
        deque(iter(lambda: stream.recv(timeout=30), None), maxlen=0)
    assert end.value.rcvd is not None
    return end.value.rcvd.code, end.value.rcvd.reason


def masked(first: int, payload: bytes) -> bytes:
    """Build a masked frame, as a client sends it; `first` is its first byte."""
    size = len(payload)
    head = bytes((first, 0x80 | size)) if size < 126 else bytes((first, 0xFE)) + size.to_bytes(2)
    mask = b"\x5a\xa5\x3c\xc3"
    return head + mask + bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))


def raw_stream(url: str, *headers: str) -> socket.socket:
    """Open a stream on a raw socket, for bytes that no WebSocket client would send. `url` begins with ws."""
    connection = connect_raw(url)
    connection.sendall(upgrade(url, *headers))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1) or b"\r\n\r\n"
    assert head.startswith(b"HTTP/1.1 101 "), head
    return connection


def upgrade(url: str, *headers: str) -> bytes:
    """Build the request that opens a stream."""
    where = urlsplit(url)
    lines = [
        f"GET {where.path}{'?' * bool(where.query)}{where.query} HTTP/1.1",
        f"Host: {where.netloc}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *headers,
    ]
    return "\r\n".join((*lines, "", "")).encode()


def close_code(connection: socket.socket) -> int | None:
    """Read frames until the server closes; return the code of its close frame, None if it sent none."""
    received, at, code = read_all(connection), 0, None
    while at < len(received):
        opcode, size = received[at] & 0x0F, received[at + 1]
        at += 2
        if size > 125:
            wide = 2 if size == 126 else 8
            size, at = int.from_bytes(received[at : at + wide]), at + wide
        if opcode == 8:
            code = int.from_bytes(received[at : at + 2]) if size else 0
        at += size
    return code
