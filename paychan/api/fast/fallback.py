"""The detour of one request through Tornado: its parser, its handlers, its WebSockets, on the same connection.

The transport of the fast lane stops reading, a duplicate of its socket gets one of Tornado's streams, and that begins with
the bytes that were read already. Nothing is translated, so what a client sees is Tornado's doing to the last byte. After
the answer, what was read too much goes back. A WebSocket takes the connection over (`streamtransport`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from tornado.http1connection import HTTP1Connection
from tornado.httpserver import _HTTPRequestContext
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError

from paychan.api.rate_limited_log import RateLimitedLog
from paychan.api.transport import give_back, mark, taker_of

if TYPE_CHECKING:
    from paychan.api.fast.connection import Connection
    from paychan.api.fast.server import FastServer

log = structlog.get_logger("api")


_no_file = RateLimitedLog("connection closed, its request could not be read")


class _Stream(IOStream):
    """A stream over a duplicate of a connection's socket, which begins with bytes that were read before."""

    def __init__(self, duplicate: socket.socket, begun: bytes, **limits: Any) -> None:
        self._begun, self._reads_on = memoryview(begun), True
        super().__init__(duplicate, **limits)

    def set_nodelay(self, value: bool) -> None:
        """Answers leave in one piece; there is nothing to gather."""

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        if self._begun:
            size = min(len(buf), len(self._begun))
            buf[:size] = self._begun[:size]
            self._begun = self._begun[size:]
            return size
        return super().read_from_fd(buf) if self._reads_on else None

    def give_back(self) -> bytes:
        """Close, and return what was read too much; the connection stays, as its first descriptor is open."""
        self._reads_on = False
        return give_back(self)


class Fallback:
    """One request on its way through Tornado."""

    def __init__(self, server: FastServer, connection: Connection, begun: bytes) -> None:
        self._server, self._connection, self._begun = server, connection, begun
        self._began = asyncio.get_running_loop().time()
        self._stream: _Stream | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Let Tornado read the request, unless the connection has ended meanwhile."""
        if not self._connection.transport.is_closing():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def abort(self) -> None:
        """End it, however far it has come."""
        if self._stream is not None:
            self._stream.close()

    async def close(self) -> None:
        """End it, and wait until it has ended."""
        self.abort()
        if self._task is not None:
            await asyncio.wait([self._task])
        if (taker := taker_of(self._stream)) is not None:
            taker.abort()

    async def _run(self) -> None:
        transport, server = self._connection.transport, self._server
        try:
            duplicate = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError as error:  # no file is left, or the connection is gone
            _no_file.tell(reason=error.strerror)
            transport.abort()
            return
        stream = self._stream = _Stream(
            duplicate, self._begun, max_buffer_size=server.max_buffer_size, read_chunk_size=server.read_chunk_size
        )
        mark(stream, partial(server.places.leave, self._connection))
        request = HTTP1Connection(stream, False, server.conn_params, self._context(stream))
        goes_on = False
        try:
            goes_on = await request.read_response(server.start_request(self._connection, request))
        except (StreamClosedError, UnsatisfiableReadError):
            pass
        except Exception:
            log.exception("connection failed")
        if taker_of(stream) is not None:  # a WebSocket has the connection, which counts until that ends
            self._connection.detached = True
            transport.abort()
        elif not goes_on or stream.closed():
            stream.close()
            transport.close()
            self._connection.come_back(b"")
        else:
            self._connection.come_back(stream.give_back())

    def _context(self, stream: _Stream) -> Any:
        context: Any = _HTTPRequestContext(stream, self._connection.address, self._server.protocol)
        context.guest, context.manners, context.began = self._connection, self._connection.manners, self._began
        return context
