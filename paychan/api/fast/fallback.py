"""Serves one request through Tornado's parser and handlers on a connection of the fast path.

The transport of the fast path stops reading. A Tornado stream is opened over a duplicate of the socket; it begins with
the bytes that were read already. Tornado writes the answer itself, so that it is the same as without the fast path.
After the answer the bytes that Tornado has read but not used return to the fast path.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio import Future
from typing import TYPE_CHECKING, Any

import structlog
from tornado.http1connection import HTTP1Connection
from tornado.httpserver import _HTTPRequestContext
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError

from paychan.api.limits import TORNADOS_400, unreadable
from paychan.api.rate_limited_log import RateLimitedLog

if TYPE_CHECKING:
    from paychan.api.fast.connection import Connection
    from paychan.api.fast.server import FastServer

log = structlog.get_logger("api")


_unreadable = RateLimitedLog("connection closed, its request could not be read")


class _Stream(IOStream):
    """A Tornado stream over a duplicate of a connection's socket; it first returns bytes that were read before."""

    def __init__(self, duplicate: socket.socket, begun: bytes, **limits: Any) -> None:
        self._begun, self._reads_on = memoryview(begun), True
        super().__init__(duplicate, **limits)

    def set_nodelay(self, value: bool) -> None:
        """Do nothing: each answer is written in one piece, so that Nagle's algorithm is not needed."""

    def write(self, data: bytes | memoryview) -> Future[None]:
        return super().write(unreadable() if data == TORNADOS_400 else data)

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        if self._begun:
            size = min(len(buf), len(self._begun))
            buf[:size] = self._begun[:size]
            self._begun = self._begun[size:]
            return size
        return super().read_from_fd(buf) if self._reads_on else None

    def give_back(self) -> bytes:
        """Close this stream and return its unused bytes; the connection stays open through its first descriptor."""
        self._reads_on, rest = False, b""
        while not self.closed():
            more: Any = self.read_bytes(1 << 20, partial=True)  # a Future
            if not more.done():
                break
            rest += more.result()
        self.close()
        return rest


class Fallback:
    """One request that Tornado serves."""

    def __init__(self, server: FastServer, connection: Connection, begun: bytes) -> None:
        self._server, self._connection, self._begun = server, connection, begun
        self._began = asyncio.get_running_loop().time()
        self._stream: _Stream | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Let Tornado read the request, unless the connection has ended."""
        if not self._connection.transport.is_closing():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def abort(self) -> None:
        """Stop it at any stage."""
        if self._stream is not None:
            self._stream.close()

    async def close(self) -> None:
        """Stop it, and wait until it has ended."""
        self.abort()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        transport, server = self._connection.transport, self._server
        try:
            duplicate = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError as error:  # no descriptor is free, or the connection is gone
            _unreadable.warning(reason=error.strerror)
            transport.abort()
            return
        stream = self._stream = _Stream(
            duplicate, self._begun, max_buffer_size=server.max_buffer_size, read_chunk_size=server.read_chunk_size
        )
        request = HTTP1Connection(stream, False, server.conn_params, self._context(stream))
        goes_on = False
        try:
            goes_on = await request.read_response(server.start_request(self._connection, request))
        except (StreamClosedError, UnsatisfiableReadError):
            pass
        except Exception:
            log.exception("connection failed")
        if not goes_on or stream.closed():
            stream.close()
            transport.close()
            self._connection.come_back(b"")
        else:
            self._connection.come_back(stream.give_back())

    def _context(self, stream: _Stream) -> Any:
        context: Any = _HTTPRequestContext(stream, self._connection.address, self._server.protocol)
        context.holder, context.penalty, context.began = self._connection, self._connection.penalty, self._began
        return context
