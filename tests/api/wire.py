"""A socket to the server, for bytes that no HTTP client would send."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

PATIENCE_SECONDS = 10.0
"""A server that has not closed the connection by then hangs."""


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=PATIENCE_SECONDS)
    _opened.append(connection)
    return connection


_opened: list[socket.socket] = []


def close_all() -> None:
    """Close what a test left open; `conftest` calls it after each."""
    while _opened:
        _opened.pop().close()


def exchange(url: str, *pieces: bytes) -> bytes:
    """Send, and return everything that comes until the server closes.

    Raises:
        TimeoutError: it does not close.
    """
    with connect(url) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes; a reset after what it sent is an end too."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def statuses(received: bytes) -> list[int]:
    """List the final status of each answer."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", received)]
