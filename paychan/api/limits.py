"""A Tornado server whose connections have places, and that has a bound on its patience with clients.

Without a bound idle connections take every file the process may open: then accepting fails, and the store, which needs
files too, stops the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from tornado.http1connection import HTTP1ServerConnection
from tornado.httpserver import HTTPServer, _HTTPRequestContext
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError

from paychan.api.budgets.accepting import Acceptor
from paychan.api.budgets.connection_slots import WORKING, Places, SlotHolder, network_of_peer
from paychan.api.budgets.fallback_queue import FallbackQueue
from paychan.api.budgets.head_limits import size_of_head
from paychan.api.response_heads import laid_out
from paychan.api.responses import refusal
from paychan.api.transport import mark, taker_of
from paychan.protocol.errors import PaychanError

BACKLOG = 1024
"""Connections that the kernel keeps for us until we take them (it may allow fewer). What comes on top of them is sent again
only after a second, so a few hundred clients that come at once must find room."""

_PARTING = 64
"""Refused connections that are kept open for a moment, because closing at once could destroy the answer on its way."""
_PARTING_SECONDS = 1.0


class BoundedServer(HTTPServer):
    """Set `places`, the times and `refusal`, then `listen_on`."""

    places: Places
    patience_seconds = 0
    """A connection without a request, or that takes no answers, is closed."""
    head_seconds = 0
    """The same for one whose first request does not come, or whose request's head does not come whole."""
    refusal = b""
    """The answer to a connection for which there is no place."""
    detours: FallbackQueue
    """Requests that Tornado reads begin in turns, those of connections that it serves alone too."""
    _acceptor: Acceptor | None = None
    _parting: deque[socket.socket]

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        """Begin to accept."""
        self._parting, self.detours = deque(), FallbackQueue()
        self._acceptor = Acceptor(sockets, self.take, partial(self.places.make_room, paid_too=False))

    def stop(self) -> None:
        """Accept no more."""
        if self._acceptor is not None:
            self._acceptor.stop()

    def take(self, connection: socket.socket, address: Any) -> None:
        """Serve an accepted connection, or refuse it."""
        guest = _TornadoSlotHolder(network_of_peer(address))
        if not self.places.admit(guest):
            self.refuse(connection)
            return
        # Tornado waits for ever for a client that takes no answer; the kernel does not wait for acknowledgements
        set_patience(connection, self.patience_seconds)
        guest.stream = stream = _Stream(
            connection,
            partial(self.detours.begin, guest.network),
            max_buffer_size=self.max_buffer_size,
            read_chunk_size=self.read_chunk_size,
        )
        mark(stream, partial(self.places.leave, guest))
        # one switch for good: Tornado would turn Nagle's algorithm on and off around every answer
        stream.set_nodelay(True)
        stream.set_nodelay = _no_more  # type: ignore[method-assign]
        context: Any = _HTTPRequestContext(stream, address, self.protocol, self.trusted_downstream)
        context.guest = guest
        asyncio.get_running_loop().call_later(self.head_seconds, guest.check_first)
        served: Any = HTTP1ServerConnection(stream, self.conn_params, context)
        self._connections.add(served)
        served.start_serving(self)

    def on_close(self, server_conn: Any) -> None:
        if taker_of(server_conn.stream) is None:
            server_conn.stream.release()
        super().on_close(server_conn)

    def refuse(self, connection: socket.socket) -> None:
        """Say 503 and close: at once if others are being refused, else when the client has had time to read it."""
        with contextlib.suppress(OSError):
            connection.send(self.refusal)
            connection.shutdown(socket.SHUT_WR)
        self._parting.append(connection)
        if len(self._parting) > _PARTING:
            self._parting.popleft().close()
        asyncio.get_running_loop().call_later(_PARTING_SECONDS, connection.close)


class _Stream(IOStream):
    """Gives each request's head when its turn comes, and forgets, when it is closed, what was read and not asked for.

    Tornado would serve all requests that a client had sent, one behind the other, although no answer can leave: a crowd that
    sends some thousands and goes would cost as much as one that stays.
    """

    _read_buffer: bytearray
    _read_buffer_size: int
    _head_limit = 0

    def __init__(self, connection: socket.socket, begin: Callable[[Callable[[], object]], None], **limits: Any) -> None:
        """`begin` calls its argument when the turn of a request of this connection has come."""
        self._begin = begin
        super().__init__(connection, **limits)

    async def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> bytes:
        """Read a head (Tornado reads nothing else by a pattern), and wait for its turn; refuse one that is too large.

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
    """A connection that Tornado serves; handlers say when they begin to work for it and when they rest."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.paid = False
        self.evictor: Any = None
        self.stream: IOStream | None = None
        self._made = self._since = monotonic()
        self._works = False

    @property
    def waits_since(self) -> float:
        return WORKING if self._works else self._since

    def begins(self) -> None:
        self._works = True

    def rests(self) -> None:
        self._works, self._since = False, monotonic()

    def check_first(self) -> None:
        """Close it if its first request has not come."""
        if not self._works and self._since == self._made and self.stream is not None:
            self.stream.close()

    def evict(self) -> None:
        if self.evictor is not None:
            self.evictor()
        elif self.stream is not None:
            self.stream.close()


def set_patience(connection: socket.socket, seconds: float) -> None:
    """Let the kernel end a connection whose client acknowledges nothing for this long."""
    with contextlib.suppress(OSError):  # it may have ended
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _no_more(value: bool) -> None:
    """Answers leave in one piece; there is nothing to gather."""
