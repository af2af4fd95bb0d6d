"""Moves a connection from Tornado's stream, which read the upgrade request, to a transport of the event loop.

The server that makes a stream sets two attributes on it with `mark`: `release`, which frees the connection's slot, and
`taker`, the protocol that has taken the connection over. After `take_over` the slot belongs to the WebSocket. It is
freed when the WebSocket ends, also if the WebSocket could not begin.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import structlog

from paychan.shared.handover import handed_over

log = structlog.get_logger("stream")


def mark(stream: Any, release: Callable[[], object]) -> None:
    """Prepare a stream for `take_over`; `release` frees the slot of its connection."""
    stream.release, stream.taker = release, None


def taker_of(stream: Any) -> Any:
    """Return the protocol that has taken over a stream's connection and its slot, or None."""
    return getattr(stream, "taker", None)


async def take_over(stream: Any, taker: Any, head: bytes) -> bool:
    """Continue a connection with the protocol `taker`, which writes `head` first.

    Returns False if the connection is gone.
    """
    if stream is None or stream.closed():
        return False
    stream.taker, release = taker, stream.release
    try:
        duplicate = socket.socket(fileno=os.dup(stream.socket.fileno()))
        duplicate.setblocking(False)
        taker.on_lost = release
        taker.begins_with(head, _unread(stream))
        with handed_over(duplicate):
            await asyncio.get_running_loop().create_connection(lambda: taker, sock=duplicate)
    except BaseException as error:
        stream.close()
        taker.on_lost = None
        release()
        if not isinstance(error, OSError):
            raise
        log.warning("connection closed", reason=str(error))
        return False
    return True


def give_back(stream: Any) -> bytes:
    """Close a stream that reads no more, and return its unused bytes; another descriptor keeps the connection open."""
    rest = b""
    while not stream.closed():
        more = stream.read_bytes(1 << 20, partial=True)  # a Future
        if not more.done():
            break
        rest += more.result()
    stream.close()
    return rest


def _unread(stream: Any) -> bytes:
    if hasattr(stream, "give_back"):  # a fallback stream, which begins with bytes that were read before it
        unused: bytes = stream.give_back()
        return unused
    stream.read_from_fd = _nothing
    return give_back(stream)


def _nothing(_buffer: Any) -> None:
    """Read nothing."""
