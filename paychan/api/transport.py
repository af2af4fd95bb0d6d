"""Moving a connection from Tornado's stream, which read the upgrade request, to the event loop's own transport.

Whoever made the stream put two marks on it: `release`, which gives back the connection's place, and `taker`. From
`take_over` on the place is the WebSocket's, and is given back when that ends, also when it never begins.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger("stream")


def mark(stream: Any, release: Callable[[], object]) -> None:
    """Let a stream be taken over; `release` gives back its connection's place."""
    stream.release, stream.taker = release, None


def taker_of(stream: Any) -> Any:
    """Return what has taken a stream's connection over, and the connection's place with it; None: nothing has."""
    return getattr(stream, "taker", None)


async def take_over(stream: Any, taker: Any, head: bytes) -> bool:
    """Let a protocol go on with a connection; False if that is gone."""
    if stream is None or stream.closed():
        return False
    stream.taker, release = taker, stream.release
    duplicate = None
    try:
        duplicate = socket.socket(fileno=os.dup(stream.socket.fileno()))
        duplicate.setblocking(False)
        taker.on_lost = release
        taker.begins_with(head, _unread(stream))
        await asyncio.get_running_loop().create_connection(lambda: taker, sock=duplicate)
    except BaseException as error:
        stream.close()
        if duplicate is not None:
            duplicate.close()
        taker.on_lost = None
        release()
        if not isinstance(error, OSError):
            raise
        log.warning("connection closed", reason=str(error))
        return False
    return True


def give_back(stream: Any) -> bytes:
    """Close a stream that reads no more, and return what it had read too much; another descriptor keeps its connection."""
    rest = b""
    while not stream.closed():
        more = stream.read_bytes(1 << 20, partial=True)  # a Future
        if not more.done():
            break
        rest += more.result()
    stream.close()
    return rest


def _unread(stream: Any) -> bytes:
    if hasattr(stream, "give_back"):  # a detour's, which begins with bytes that were read before it
        came: bytes = stream.give_back()
        return came
    stream.read_from_fd = _nothing
    return give_back(stream)


def _nothing(_buffer: Any) -> None:
    """No more is read."""
