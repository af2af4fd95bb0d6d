"""Connections of the signer's socket: who is served, and a reply within the time limit; no peer can delay the others.

All memory that a peer can occupy is bounded, whatever it sends or does not read. When all slots are in use, the
connection that has been idle longest is closed, even in the middle of a frame, so the server gets a slot during any
flood of connections. A peer that sends no valid request gets the reason, with request id 0, and its connection ends.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import structlog
from msgspec import Struct

from paychan.protocol.wire.signer_messages import Refusal, Reply, Request
from signer import vital
from signer.judge.rate import Budget
from signer.server.connection import Connection
from signer.server.socket_file import peer_uid

FAREWELLS = 64
"""Most refused connections that get the reason at the same time; further ones are closed without a reply."""

LINES_PER_SECOND = 1
"""Refusals that go to the log; the log must not fill the disk. The audit log has its own limit."""

_ACCEPT_PAUSE_SECONDS = 0.1

_PASSING = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC),
    *(errno.ECONNABORTED, errno.ECONNRESET, errno.EINTR, errno.EPROTO),
}
"""The kernel has no descriptor or no memory for a connection, or the connection has ended. The listener still works."""

Handle: TypeAlias = Callable[[Request, int], Awaitable[Reply]]
"""Answers a request of a peer with this user: `handler.Handler.handle`."""

log = structlog.get_logger()


class Limits(Struct, frozen=True):
    """Users that are served, and the time limits of each connection."""

    allowed_uids: frozenset[int]
    request_seconds: float
    idle_seconds: float
    max_connections: int


class Connections:
    """Serves the connections of one socket."""

    def __init__(self, handle: Handle, limits: Limits) -> None:
        self._handle = handle
        self._limits = limits
        self._admitted: dict[Connection, None] = {}
        """The connection that has been idle longest comes first."""
        self._leaving: set[Connection] = set()
        self._deadlines: dict[asyncio.Task[Any] | None, float] = {}
        """The tasks that answer a request, and the time of the event loop by which each must end."""
        self._lines = Budget(LINES_PER_SECOND, time.monotonic())

    async def accept(self, listener: socket.socket) -> None:
        """Serve connections until cancelled; then all connections end.

        Further connections wait in the listener's queue, in order. Between two of them the event loop serves the
        existing ones: a peer that has sent a request gets the answer before enough others arrive to displace it.
        """
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            ending = False
            late = tasks.create_task(self._end_late())
            vital.watch("late requests", late, lambda: ending)
            try:
                await self._let_in(listener)
            finally:
                ending = True
                late.cancel()
                self._end_all()

    async def _let_in(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
                await self._begin(accepted)
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                if self._lines.take(time.monotonic()):
                    log.error("can't accept", reason=error.strerror, connections=len(self._admitted))  # noqa: TRY400
                await asyncio.sleep(0 if self._make_room() else _ACCEPT_PAUSE_SECONDS)

    async def _begin(self, accepted: socket.socket) -> None:
        """Attach the event loop to a connection. Raises OSError."""
        loop, limits = asyncio.get_running_loop(), self._limits
        try:
            connection = Connection(self, peer_uid(accepted), limits.request_seconds, limits.idle_seconds)
            await loop.connect_accepted_socket(lambda: connection, accepted)
        except BaseException:
            accepted.close()
            raise

    async def _end_late(self) -> None:
        """Look for late requests at intervals, for ever: a timer for each request would cost more than a look."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(self._limits.request_seconds, self._limits.idle_seconds) / 10)
            for task in [task for task, deadline in self._deadlines.items() if task and deadline < now()]:
                task.cancel()
            for connection in [*self._admitted]:
                connection.end_late(now())

    def _end_all(self) -> None:
        for connection in (*self._admitted, *self._leaving):
            connection.transport.abort()
        for task in self._deadlines:
            if task:
                task.cancel()

    # --- called by the connections ----------------------------------------------------------------------------------

    def admit(self, connection: Connection) -> None:
        """Admit a peer if its user is allowed, and there is a free slot or one can be freed."""
        if connection.uid not in self._limits.allowed_uids:
            connection.stop(Refusal(0, "policy-peer", f"uid {connection.uid} is not in socket.allowed_uids"))
        elif len(self._admitted) >= self._limits.max_connections and not self._make_room():
            connection.stop(Refusal(0, "protocol-busy", f"{len(self._admitted)} connections are open and busy"))
        else:
            self._admitted[connection] = None

    def _make_room(self) -> bool:
        """Close the connection that has been idle longest; return False if all wait for an answer."""
        idle = next((connection for connection in self._admitted if not connection.in_flight), None)
        if idle is None:
            return False
        del self._admitted[idle]
        idle.transport.abort()
        return True

    def answer(self, connection: Connection, request: Request, size: int) -> None:
        """Answer a request, beside those that wait for the disk or for a token."""
        if connection in self._admitted:
            self._admitted[connection] = self._admitted.pop(connection)  # it was idle less long than all others
        asyncio.get_running_loop().create_task(self._answer(connection, request, size))

    async def _answer(self, connection: Connection, request: Request, size: int) -> None:
        seconds, task = self._limits.request_seconds, asyncio.current_task()
        self._deadlines[task] = asyncio.get_running_loop().time() + seconds
        try:
            reply = await self._handle(request, connection.uid)
        except asyncio.CancelledError:
            reply = Refusal(request.id, "policy-deadline", f"not done within {seconds} s")
        except Exception as error:  # noqa: BLE001 - a bug must neither end the signer nor show request data
            vital.tell_bug(error)
            reply = Refusal(request.id, "protocol-internal", "the signer failed")
        finally:
            del self._deadlines[task]
        if isinstance(reply, Refusal) and self._lines.take(time.monotonic()):
            log.warning("refused", tag=reply.tag, reason=reply.reason)  # the audit log has every decision
        connection.reply(reply, size)

    def turn_away(self, connection: Connection, refusal: Refusal) -> None:
        """Give a peer the reason for which its connection ends; only log and close if many are being told."""
        if self._lines.take(time.monotonic()):
            log.warning("turned away", tag=refusal.tag, reason=refusal.reason)
        self._admitted.pop(connection, None)
        if len(self._leaving) >= FAREWELLS:
            connection.transport.abort()
            return
        self._leaving.add(connection)
        connection.say_goodbye(refusal)

    def forget(self, connection: Connection) -> None:
        """Forget a closed connection; the replies to its requests are dropped."""
        self._admitted.pop(connection, None)
        self._leaving.discard(connection)
