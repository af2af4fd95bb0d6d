"""A Tornado server with a bound on its connections, and on its patience with who takes no answers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from time import monotonic
from typing import Any

import structlog
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream

from paychan.api.streamtransport import mark, taker_of

log = structlog.get_logger("access")

BACKLOG = 1024
"""Connections that the kernel keeps for us until we take them (it may allow fewer). What comes on top of them is sent again
only after a second, so a few hundred clients that come at once must find room."""

_WARNING_SECONDS = 60


class BoundedServer(HTTPServer):
    """Keeps only so many connections, and closes a further one at once, and one that takes no answers.

    Without a bound idle connections take every file the process may open: then accepting fails in a loop that fills the
    log, and the store, which needs files too, stops the process.
    """

    max_connections = 0
    patience_seconds = 0
    _open = 0
    _warned_at = float("-inf")

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        """Begin to accept."""
        self.add_sockets(sockets)

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        if not self.take_place():
            stream.close()
            return
        # Tornado waits for ever for a client that takes no answer; the kernel does not wait for acknowledgements
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * self.patience_seconds)
        # one switch for good: Tornado would turn Nagle's algorithm on and off around every answer
        stream.set_nodelay(True)
        stream.set_nodelay = _no_more  # type: ignore[method-assign]
        mark(stream, self.give_place_back)
        super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        if taker_of(server_conn.stream) is None:
            self.give_place_back()
        super().on_close(server_conn)

    def take_place(self) -> bool:
        """Count a new connection; False if there is no place for it."""
        if self._open < self.max_connections:
            self._open += 1
            return True
        if monotonic() - self._warned_at >= _WARNING_SECONDS:
            self._warned_at = monotonic()
            log.warning("all connections are taken, closing new ones", open=self._open)
        return False

    def give_place_back(self) -> None:
        """Count a connection that ended."""
        self._open -= 1


def _no_more(value: bool) -> None:
    """Answers leave in one piece; there is nothing to gather."""
