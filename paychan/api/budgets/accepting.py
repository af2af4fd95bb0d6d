"""Taking connections from listening sockets.

A few are accepted in one turn of the loop, so that a flood of new connections leaves the connected clients their turns.
When the process or the system has no descriptor or memory left for one more, accepting rests: a listening socket stays
readable then, and asking it again at once would be a loop that does nothing else. Connections that wait for their client
are closed meanwhile, and the log says it once a minute.

uvloop's own servers end for good on such an error, and Tornado's log a traceback for each; so neither is used.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from paychan.api.rate_limited_log import RateLimitedLog

_AT_ONCE = 2
"""Connections accepted in one turn: about a fifth of a millisecond."""

_REST_SECONDS = 0.2


class Acceptor:
    """Accepts on the sockets of one listener until it is stopped."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        take: Callable[[socket.socket, Any], None],
        make_room: Callable[[], object],
    ) -> None:
        """`take` gets each connection and its client's address; `make_room` closes some connections that wait."""
        self._sockets = list(sockets)
        self._take, self._make_room = take, make_room
        self._loop = asyncio.get_running_loop()
        self._failing = RateLimitedLog("can't accept connections, resting")
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
        """Accept no more for a moment: EMFILE, ENFILE, ENOBUFS and ENOMEM do not go away by asking."""
        self._loop.remove_reader(listener)
        self._failing.tell(reason=error.strerror)
        self._make_room()
        self._loop.call_later(_REST_SECONDS, self._go_on, listener)

    def _go_on(self, listener: socket.socket) -> None:
        if not self._stopped:
            self._loop.add_reader(listener, self._accept, listener)
