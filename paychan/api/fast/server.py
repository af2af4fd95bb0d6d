"""The listener of the fast path, with an overview of the modules of this package.

Tornado's HTTP layers cost three times as much as checking a signature. So payment requests bypass them:

    socket ──▶ connection ──▶ request_parser (httptools) ──▶ payments ──▶ actor ──▶ commit ──▶ response_heads ──▶ socket
                    ├── begins a stream ──▶ stream.upgrade: the connection becomes a WebSocket
                    └── every other request ──▶ fallback ──▶ Tornado's parser, handlers

* A connection is an asyncio protocol. `request_parser` reads its bytes, and knows only payment requests in their plain
  form; `stream.upgrade` knows requests that begin a stream. Every other request, also a payment or an upgrade in an
  unusual form, goes to the fallback: Tornado reads it from its first byte. So one parser decides about unusual
  requests, and no second one can disagree. A fallback begins when the request has arrived, with a body of known size;
  a head that is too large (`head_limits`) is refused here. After the answer the connection returns to the fast path.
  So a client can open a channel with POST and pay with PUT on one connection.
* `payments` submits a payment to the channel's actor if the actor is awake, with the functions of the handlers (`v1`,
  `v2`, `responses`). It makes no task: the answer is written when the commit calls back. All payments that arrived in
  one turn of the loop are read, then prechecked, then verified, because the code and data of each step then stay in the
  CPU's caches; the actors book them. Of several payments of one channel the newest is verified first, as in a stream
  (`protocol.payment_batch`). The handlers' coroutines serve a channel that sleeps or is unknown, and every other case
  that must wait.
* The limits are those of `BoundedServer`: number of connections, size of heads and bodies, idle time, head time, body
  time, and clients that do not read their answers. A periodic scan of all connections replaces a timer for each
  request.
* Fallbacks are queued (`fallback_queue`): at most one begins in two milliseconds.

`http.fast_lane = false` switches the fast path of payments off: the same connections then hand them to the fallback.
Clients see the same behaviour, which tests/api checks, with the exception of `protocol.payment_batch`: a good payment
that is pipelined behind a bad signature covers it if it includes that payment.
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
from paychan.shared.handover import handed_over
from paychan.supervisor import Supervised

log = structlog.get_logger("server")

_CLOSE_FRAME_SECONDS = 1.0
"""Time that clients of open streams have to answer the close frame when the server stops."""
_POLL_SECONDS = 0.005

_SWEPT_AT_ONCE = 64
"""Connections whose timeouts are checked in one turn of the loop."""


class FastServer(BoundedServer):
    """Tornado's server behind the fast path. Set `processor` and the limits, then call `listen_on`."""

    processor: PaymentProcessor
    takes_payments = True
    """Whether payments take the fast path; otherwise Tornado serves all requests but those that begin a stream."""
    body_seconds: float = 0
    _connecting: set[asyncio.Task[None]]
    _sweeper: Supervised | None = None

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        self._connecting = set()
        self._sweeper = self.processor.service.supervisor.run("connection sweeper", self._sweep)
        await super().listen_on(sockets)

    def take(self, connection: socket.socket, address: Any) -> None:
        holder = Connection(self, self.processor, address)
        if not self.slots.admit(holder):
            self.refuse(connection)
            return
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # the kernel closes a connection whose client acknowledges no data
        set_patience(connection, self.patience_seconds)
        task = asyncio.get_running_loop().create_task(self._connect(holder, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, holder: Connection, connection: socket.socket) -> None:
        try:
            with handed_over(connection):
                await asyncio.get_running_loop().connect_accepted_socket(lambda: holder, connection)
        except OSError:  # the connection has ended
            self.slots.leave(holder)

    def forget(self, connection: Connection) -> None:
        """Free the slot of a closed connection, unless a WebSocket has taken the connection over."""
        if not connection.detached:
            self.slots.leave(connection)

    async def close_all_connections(self) -> None:
        if self._sweeper is None:
            return
        await self._sweeper.stop()
        await asyncio.gather(*self._connecting)
        streams_end = monotonic() + _CLOSE_FRAME_SECONDS
        while len(self.slots):
            late = monotonic() >= streams_end
            await asyncio.gather(*(each.close(streams_too=late) for each in self.slots))
            await asyncio.sleep(_POLL_SECONDS)

    async def _sweep(self, task: Supervised) -> None:
        """Scan periodically for connections with an expired timeout.

        A failure at one connection does not stop the scan.
        """
        while True:
            await asyncio.sleep(min(1.0, self.patience_seconds / 4, self.head_seconds / 4, self.body_seconds / 4))
            now = monotonic()
            for number, connection in enumerate(self.slots):
                if number % _SWEPT_AT_ONCE == 0:
                    await asyncio.sleep(0)  # ten thousand connections in one turn would delay payments by 10 ms
                try:
                    connection.check_time(now, self.patience_seconds, self.head_seconds, self.body_seconds)
                except Exception:
                    log.exception("connection failed")
            task.succeeded()
