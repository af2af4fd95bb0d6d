"""The fast lane's listener. This page explains the lane; `connection`, `plain`, `payments`, `heads` and `detour` are it.

Tornado's HTTP layers cost three times what checking a signature costs, so payments do without them:

    socket ──▶ connection ──▶ plain (httptools) ──▶ payments ──▶ actor ──▶ commit ──▶ heads ──▶ socket
                    └── anything but a plain payment ──▶ detour ──▶ Tornado's parser, handlers, WebSockets

* A connection is an asyncio protocol. What it reads is given to `plain`, which knows one thing: a payment request in its
  plain form, parsed by httptools. Everything else, also a payment that is only a little odd, takes the detour: Tornado
  reads it from its first byte, so there is one judge of what is odd, and no second opinion that could differ. After the
  answer the connection is back in the lane; a client opens a channel with POST and pays with PUT on one connection.
* `payments` asks the channel's actor if it is awake, with the functions that the handlers use too (`v1`, `v2`, `answers`).
  No task is made: the answer is written when the commit calls back. What came in one turn of the loop is read, then
  verified, then booked, step by step for all of it, because each step has its own code and tables in the processor's
  caches; of several payments of one channel the newest is verified first, as in a stream (`protocol.several`). A channel
  that sleeps, is unknown, or asks for more than that is served by the handlers' own coroutines.
* Limits are those of Tornado's server: number of connections, bytes of heads and bodies, idle time, body time, and
  clients that don't take their answers. One look at all connections now and then replaces a timer for each request.

`http.fast_lane = false` leaves all this out; what clients see is the same, which tests/api holds both to. The one exception
is that of `protocol.several`: pipelined behind a bad signature, a good one that includes it covers it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from functools import partial
from time import monotonic

from paychan.api.bounded import BACKLOG, BoundedServer
from paychan.api.connection import Connection
from paychan.api.payments import Till


class LaneServer(BoundedServer):
    """Tornado's server behind the fast lane; set `till`, the limits, then `listen`."""

    till: Till
    body_seconds: float = 0
    _lane: set[Connection]
    _listeners: Sequence[asyncio.Server] = ()
    _sweeper: asyncio.Task[None] | None = None

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        self._lane = set()
        self._listeners = [
            await loop.create_server(partial(Connection, self, self.till), sock=each, backlog=BACKLOG)
            for each in sockets
        ]
        self._sweeper = loop.create_task(self._sweep())

    def admit(self, connection: Connection) -> bool:
        """Count a new connection, unless all are taken."""
        if not self.take_place():
            return False
        self._lane.add(connection)
        return True

    def release(self, connection: Connection) -> None:
        """Give back the place of a connection that ended."""
        if connection in self._lane:
            self._lane.discard(connection)
            self.give_place_back()

    def forget(self, connection: Connection) -> None:
        """The transport of a connection is gone; a WebSocket may have taken the connection over."""
        if not connection.detached:
            self.release(connection)

    def stop(self) -> None:
        for each in self._listeners:
            each.close()

    async def close_all_connections(self) -> None:
        if self._sweeper is None:
            return
        self._sweeper.cancel()
        while self._lane:
            await asyncio.gather(*(each.close() for each in list(self._lane)))
            await asyncio.sleep(0)

    async def _sweep(self) -> None:
        """Close, for ever, what waits too long."""
        while True:
            await asyncio.sleep(min(1.0, self.patience_seconds / 4, self.body_seconds / 4))
            now = monotonic()
            for connection in list(self._lane):
                connection.check_time(now - self.patience_seconds, now - self.body_seconds)
