"""A socket to the server, for bytes that no HTTP client would send."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

PATIENCE_SECONDS = 30.0
"""A server that has not closed the connection after this time hangs."""


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=PATIENCE_SECONDS)
    _opened.append(connection)
    return connection


_opened: list[socket.socket] = []


def close_all() -> None:
    """Close the sockets that a test left open; `conftest` calls it after each test."""
    while _opened:
        _opened.pop().close()


def exchange(url: str, *pieces: bytes) -> bytes:
    """Send bytes, and return everything received until the server closes.

    Raises:
        TimeoutError: the server does not close the connection.
    """
    with connect(url) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection, also by a reset."""
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
