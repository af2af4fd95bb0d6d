"""A stream's socket on the event loop's own transport: what Tornado's WebSocket needs of an `IOStream`, at a third of its cost."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

from tornado.ioloop import IOLoop
from tornado.iostream import StreamClosedError

_MOST_UNREAD_BYTES = 65536
"""What may lie here before the socket is not read any more."""


class TransportStream(asyncio.Protocol):
    """Reads and writes; `on_end` is called when the connection has ended."""

    def __init__(self, begun: bytes, on_end: Callable[[], object]) -> None:
        self._unread, self._on_end = begun, on_end
        self._reader: asyncio.Future[bytes] | None = None
        self._written = asyncio.get_running_loop().create_future()
        self._written.set_result(None)
        self._transport: Any = None
        self._closed = False
        self.io_loop = IOLoop.current()

    # --- what the transport tells -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            if not reader.done():
                reader.set_result(data)
                return
        self._unread += data
        if len(self._unread) > _MOST_UNREAD_BYTES:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._written = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if not self._written.done():
            self._written.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self.resume_writing()
        if self._reader is not None and not self._reader.done():
            self._reader.set_exception(StreamClosedError(exc))
        self._on_end()

    # --- what Tornado asks ------------------------------------------------------------------------------------------

    def read_bytes(self, _size: int, *, partial: bool) -> asyncio.Future[bytes]:
        """Give what has come, or the next that comes. Only parts are ever asked for."""
        assert partial
        reader: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self._unread:
            reader.set_result(self._unread)
            if len(self._unread) > _MOST_UNREAD_BYTES and not self._closed:
                self._transport.resume_reading()
            self._unread = b""
        elif self._closed:
            reader.set_exception(StreamClosedError())
        else:
            self._reader = reader
        return reader

    def write(self, data: bytes) -> asyncio.Future[None]:
        """Write; what is returned is done while the client takes what it is sent."""
        if self.closed():
            raise StreamClosedError
        self._transport.write(data)
        return self._written

    def closed(self) -> bool:
        return self._closed or self._transport.is_closing()

    def close(self) -> None:
        """Close when all is written; at once if asked again."""
        if self._transport.is_closing():
            self._transport.abort()
        else:
            self._transport.close()

    def set_nodelay(self, _value: bool) -> None:
        """The event loop sets it for good."""


async def take_over(stream: Any) -> Any:
    """Move a connection from a stream of the detour to a transport; other streams stay as they are."""
    if not hasattr(stream, "give_back"):
        return stream
    while stream.on_end is None or stream.writing():  # noqa: ASYNC110 - its owner lets go of it in some turns of the loop
        await asyncio.sleep(0)
    if stream.closed():
        return stream
    duplicate = socket.socket(fileno=os.dup(stream.socket.fileno()))
    duplicate.setblocking(False)
    on_end, stream.on_end = stream.on_end, None
    begun = stream.give_back()
    loop = asyncio.get_running_loop()
    _, taken = await loop.create_connection(lambda: TransportStream(begun, on_end), sock=duplicate)
    return taken
