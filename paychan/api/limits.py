"""A Tornado server that limits the number of its connections, and the time that it waits for clients.

Without these limits idle connections use up the process's file descriptors. Then `accept` fails, and the store, which
needs descriptors too, stops the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio import Future
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from tornado.http1connection import HTTP1ServerConnection
from tornado.httpserver import HTTPServer, _HTTPRequestContext
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError

from paychan.api.budgets.accepting import Acceptor
from paychan.api.budgets.connection_slots import WORKING, ConnectionSlots, SlotHolder, network_of_peer
from paychan.api.budgets.fallback_queue import FallbackQueue
from paychan.api.budgets.head_limits import size_of_head
from paychan.api.response_heads import laid_out
from paychan.api.responses import refusal
from paychan.protocol.errors import Malformed, PaychanError

BACKLOG = 1024
"""Connections that the kernel queues until the server accepts them (the system may allow fewer). If the queue is full,
a client repeats its SYN only after a second. So the queue must have room for some hundred clients."""

_PARTING = 64
"""Refused connections that stay open for a moment. A close at once could reset the connection before the answer
arrives."""
_PARTING_SECONDS = 1.0


TORNADOS_400 = b"HTTP/1.1 400 Bad Request\r\n\r\n"
"""Tornado's answer to a request that it can't read, before it closes the connection."""


class BoundedServer(HTTPServer):
    """Tornado's server with limits. Set `slots` and the times, then call `listen_on`."""

    slots: ConnectionSlots
    patience_seconds = 0
    """A connection that sends no request, or acknowledges no answer, for this time is closed."""
    head_seconds = 0
    """A connection whose first request, or the complete head of a request, takes longer than this is closed."""
    fallback_queue: FallbackQueue
    """Requests that Tornado reads begin one after the other, also without the fast path."""
    _acceptor: Acceptor | None = None
    _parting: deque[socket.socket]

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        """Begin to accept connections."""
        self._parting, self.fallback_queue = deque(), FallbackQueue()
        self._acceptor = Acceptor(sockets, self.take, partial(self.slots.make_room, paid_too=False))

    def stop(self) -> None:
        """Stop accepting connections."""
        if self._acceptor is not None:
            self._acceptor.stop()

    def take(self, connection: socket.socket, address: Any) -> None:
        """Serve an accepted connection, or refuse it."""
        holder = _TornadoSlotHolder(network_of_peer(address))
        if not self.slots.admit(holder):
            self.refuse(connection)
            return
        # Tornado has no timeout for a client that reads no answer; this makes the kernel close such a connection
        set_patience(connection, self.patience_seconds)
        holder.stream = stream = _Stream(
            connection,
            partial(self.fallback_queue.begin, holder.network),
            max_buffer_size=self.max_buffer_size,
            read_chunk_size=self.read_chunk_size,
        )
        # set once: Tornado would switch Nagle's algorithm on and off around every answer
        stream.set_nodelay(True)
        stream.set_nodelay = _ignore  # type: ignore[method-assign]
        context: Any = _HTTPRequestContext(stream, address, self.protocol, self.trusted_downstream)
        context.holder = holder
        asyncio.get_running_loop().call_later(self.head_seconds, holder.check_first)
        served: Any = HTTP1ServerConnection(stream, self.conn_params, context)
        self._connections.add(served)
        served.start_serving(self)

    def on_close(self, server_conn: Any) -> None:
        self.slots.leave(server_conn.context.holder)
        super().on_close(server_conn)

    def refuse(self, connection: socket.socket) -> None:
        """Send a 503 and close the connection after a second, in which the client can read it.

        At most `_PARTING` refused connections stay open; a further one closes the oldest at once.
        """
        with contextlib.suppress(OSError):
            connection.send(laid_out(refusal(self.slots.refusal(), quiet_404=False), closes=True))
            connection.shutdown(socket.SHUT_WR)
        self._parting.append(connection)
        if len(self._parting) > _PARTING:
            self._parting.popleft().close()
        asyncio.get_running_loop().call_later(_PARTING_SECONDS, connection.close)


class _Stream(IOStream):
    """Returns each request's head when its turn comes; on close it discards the bytes that Tornado has not consumed.

    Otherwise Tornado would serve all requests that a client has sent, one after the other, even if the client has
    closed the connection. Clients that send thousands of requests and leave would then cost as much work as clients
    that stay.
    """

    _read_buffer: bytearray
    _read_buffer_size: int
    _head_limit = 0

    def __init__(self, connection: socket.socket, begin: Callable[[Callable[[], object]], None], **limits: Any) -> None:
        """`begin` calls its argument when a request of this connection may begin."""
        self._begin = begin
        super().__init__(connection, **limits)

    async def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> bytes:
        """Read a head, refuse one that is too large, then wait for its turn. Tornado reads only heads with this method.

        Raises:
            StreamClosedError: the stream is closed.
        """
        self._head_limit = max_bytes or 0
        head = await super().read_until_regex(regex, max_bytes)
        try:
            size_of_head(head, self._head_limit)
        except PaychanError as error:
            self._refuse(error)
            self.close()
            raise StreamClosedError from None
        self._head_limit = 0
        turn = asyncio.get_running_loop().create_future()
        self._begin(partial(_resolve, turn))
        await turn
        return head

    def write(self, data: bytes | memoryview) -> Future[None]:
        return super().write(unreadable() if data == TORNADOS_400 else data)

    def _refuse(self, error: PaychanError) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(laid_out(refusal(error, quiet_404=False), closes=True))

    def close(self, exc_info: Any = False) -> None:
        if self._head_limit and isinstance(exc_info, UnsatisfiableReadError):
            try:
                size_of_head(self._read_buffer, self._head_limit)
            except PaychanError as error:
                self._refuse(error)
        super().close(exc_info)
        self._read_buffer.clear()
        self._read_buffer_size = 0


class _TornadoSlotHolder(SlotHolder):
    """A connection that Tornado serves; handlers call `start_work` and `end_work`."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.paid = False
        self.evictor: Any = None
        self.stream: IOStream | None = None
        self._made = self._since = monotonic()
        self._works = False

    @property
    def idle_since(self) -> float:
        return WORKING if self._works else self._since

    def start_work(self) -> None:
        self._works = True

    def end_work(self) -> None:
        self._works, self._since = False, monotonic()

    def check_first(self) -> None:
        """Close the connection if its first request has not arrived."""
        if not self._works and self._since == self._made and self.stream is not None:
            self.stream.close()

    def evict(self) -> None:
        if self.evictor is not None:
            self.evictor()
        elif self.stream is not None:
            self.stream.close()


def set_patience(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end a connection whose client acknowledges no data for this number of seconds."""
    with contextlib.suppress(OSError):  # the connection may have ended
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))


def unreadable() -> bytes:
    """Build the answer that this server sends instead of `TORNADOS_400`, with the fields of every other answer.

    RFC 9110 6.6.1: an origin server with a clock "MUST generate a Date header field in all 2xx (Successful), 3xx
    (Redirection), and 4xx (Client Error) responses".
    """
    error = Malformed(field="request", reason="not HTTP as RFC 9112 defines it, or with a wrong Host")
    return laid_out(refusal(error, quiet_404=False), closes=True)


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _ignore(value: bool) -> None:
    """Do nothing: each answer is written in one piece, so that Nagle's algorithm is not needed."""
