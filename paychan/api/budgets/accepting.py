"""Accepts connections from listening sockets.

At most `_AT_ONCE` connections are accepted in one turn of the event loop, so that a flood of new connections does not
delay the connected clients. If the process or the system has no descriptor or no memory for one more connection,
accepting pauses: the listening socket stays readable, and a retry in each turn would keep the loop busy. Then some idle
connections are closed, and one log line a minute is written.

uvloop's own server stops permanently on such an error, and Tornado's logs a traceback for each; so neither is used.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from paychan.api.rate_limited_log import RateLimitedLog

_AT_ONCE = 2
"""Connections accepted in one turn of the loop; this takes about 0.2 ms."""

_REST_SECONDS = 0.2


class Acceptor:
    """Accepts connections on the sockets of one listener until `stop`."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        take: Callable[[socket.socket, Any], None],
        make_room: Callable[[], object],
    ) -> None:
        """`take` gets each connection and its client's address; `make_room` closes some idle connections."""
        self._sockets = list(sockets)
        self._take, self._make_room = take, make_room
        self._loop = asyncio.get_running_loop()
        self._failing = RateLimitedLog("can't accept connections, pausing")
        self._stopped = False
        for each in self._sockets:
            each.setblocking(False)
            self._loop.add_reader(each, self._accept, each)

    def stop(self) -> None:
        """Close the listening sockets."""
        self._stopped = True
        for each in self._sockets:
            self._loop.remove_reader(each)
            each.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._rest(listener, error)
                return
            connection.setblocking(False)
            self._take(connection, address)

    def _rest(self, listener: socket.socket, error: OSError) -> None:
        """Pause accepting: EMFILE, ENFILE, ENOBUFS and ENOMEM last until resources are freed."""
        self._loop.remove_reader(listener)
        self._failing.warning(reason=error.strerror)
        self._make_room()
        self._loop.call_later(_REST_SECONDS, self._go_on, listener)

    def _go_on(self, listener: socket.socket) -> None:
        if not self._stopped:
            self._loop.add_reader(listener, self._accept, listener)
