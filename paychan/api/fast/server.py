"""The fast lane's listener. This page explains the lane; `connection`, `plain`, `payments`, `heads` and `detour` are it.

Tornado's HTTP layers cost three times what checking a signature costs, so payments do without them:

    socket ──▶ connection ──▶ plain (httptools) ──▶ payments ──▶ actor ──▶ commit ──▶ heads ──▶ socket
                    └── anything but a plain payment ──▶ detour ──▶ Tornado's parser, handlers, WebSockets

* A connection is an asyncio protocol. What it reads is given to `plain`, which knows one thing: a payment request in its
  plain form, parsed by httptools. Everything else, also a payment that is only a little odd, takes the detour: Tornado
  reads it from its first byte, so there is one judge of what is odd, and no second opinion that could differ. A detour
  begins when the head has come whole; one that is too large (`headlimits`) gets its answer here, and none begins. After the
  answer the connection is back in the lane; a client opens a channel with POST and pays with PUT on one connection.
* `payments` asks the channel's actor if it is awake, with the functions that the handlers use too (`v1`, `v2`, `answers`).
  No task is made: the answer is written when the commit calls back. What came in one turn of the loop is read, then
  verified, then booked, step by step for all of it, because each step has its own code and tables in the processor's
  caches; of several payments of one channel the newest is verified first, as in a stream (`protocol.several`). A channel
  that sleeps, is unknown, or asks for more than that is served by the handlers' own coroutines.
* Limits are those of Tornado's server: number of connections, bytes of heads and bodies, idle time, head time, body time,
  and clients that don't take their answers. One look at all connections now and then replaces a timer for each request.
* Detours have their turns (`detourqueue`): few begin in one turn of the loop.

`http.fast_lane = false` leaves all this out; what clients see is the same, which tests/api holds both to. The one exception
is that of `protocol.several`: pipelined behind a bad signature, a good one that includes it covers it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from time import monotonic
from typing import Any

import structlog

from paychan.api.fast.connection import Connection
from paychan.api.fast.payments import PaymentProcessor
from paychan.api.limits import BoundedServer, set_patience
from paychan.supervisor import Supervised

log = structlog.get_logger("server")

_GOODBYE_SECONDS = 1.0
"""Streams that are open when the server stops get this long to answer its closing frame."""
_POLL_SECONDS = 0.005


class FastServer(BoundedServer):
    """Tornado's server behind the fast lane; set `processor`, the limits, then `listen`."""

    processor: PaymentProcessor
    body_seconds: float = 0
    _connecting: set[asyncio.Task[None]]
    _sweeper: Supervised | None = None

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        self._connecting = set()
        self._sweeper = self.processor.service.supervisor.run("connection sweeper", self._sweep)
        await super().listen_on(sockets)

    def take(self, connection: socket.socket, address: Any) -> None:
        guest = Connection(self, self.processor, address)
        if not self.places.admit(guest):
            self.refuse(connection)
            return
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # the kernel does not wait for ever for a client that takes no answer
        set_patience(connection, self.patience_seconds)
        task = asyncio.get_running_loop().create_task(self._connect(guest, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, guest: Connection, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: guest, connection)
        except OSError:  # it has ended
            connection.close()
            self.places.leave(guest)

    def forget(self, connection: Connection) -> None:
        """The transport of a connection is gone; a WebSocket may have taken the connection over."""
        if not connection.detached:
            self.places.leave(connection)

    async def close_all_connections(self) -> None:
        if self._sweeper is None:
            return
        await self._sweeper.stop()
        await asyncio.gather(*self._connecting)
        streams_end = monotonic() + _GOODBYE_SECONDS
        while len(self.places):
            late = monotonic() >= streams_end
            await asyncio.gather(*(each.close(streams_too=late) for each in self.places))
            await asyncio.sleep(_POLL_SECONDS)

    async def _sweep(self, task: Supervised) -> None:
        """Close, for ever, what waits too long; one connection that fails leaves the others to be looked at."""
        while True:
            await asyncio.sleep(min(1.0, self.patience_seconds / 4, self.head_seconds / 4, self.body_seconds / 4))
            now = monotonic()
            for connection in list(self.places):
                try:
                    connection.check_time(now, self.patience_seconds, self.head_seconds, self.body_seconds)
                except Exception:
                    log.exception("connection failed")
            task.succeeded()
