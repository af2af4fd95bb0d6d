"""The gateway's listener: connections with the limits of the other listeners, and 402 answers at the lowest cost.

A connection is aiohttp's, with one addition: a plain GET or HEAD that has a price and brings no payment is answered
from the bytes that arrived, without a task and without aiohttp's parser. Everything else goes to the parser from its
first byte, so that no second parser decides about a request that reaches the upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic, time
from typing import Any

from aiohttp import web

from paychan.api.budgets.accepting import Acceptor
from paychan.api.budgets.connection_slots import WORKING, ConnectionSlots, network_of_peer
from paychan.api.budgets.penalty import Penalty
from paychan.api.limits import set_patience
from paychan.protocol.errors import Malformed, PaychanError
from paychan.protocol.unpaid import (
    InvalidChallenge,
    MalformedPayment,
    PaymentTooLarge,
    PaymentUnsupported,
    TwoPayments,
)
from paychan.supervisor import Supervised

Quick = Callable[[str, str, dict[bytes, bytes], float], bytes | None]
"""Answers a request by method, target and fields at a Unix time, or leaves it to the parser."""

_PLAIN_HEAD = re.compile(
    rb"(GET|HEAD) (/[\x21\x22\x24-\x7e]*) HTTP/1\.1\r\n((?:[A-Za-z0-9-]+:[\x20-\x7e]*\r\n)+)\r\n", re.DOTALL
)
_LONGEST_PLAIN = 4096
_NEED_THE_PARSER = frozenset(
    {b"authorization", b"connection", b"content-length", b"expect", b"payment-authorization", b"payment-signature"}
    | {b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_KEEP_ALIVE = b"keep-alive"
_LINES_OF_FULL_SIZE = 4
"""An incomplete head may be as large as four lines of the largest size. aiohttp alone would hold a megabyte."""
_AS_BAD_AS_A_SIGNATURE = (InvalidChallenge, MalformedPayment, PaymentTooLarge, PaymentUnsupported, TwoPayments)
"""Refusals that no honest client causes often."""
_SWEEP_SECONDS = 1.0


class Front(web.Server):
    """The listener. aiohttp makes a `FrontConnection` for each connection of it."""

    def __init__(
        self,
        handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        quick: Quick,
        slots: ConnectionSlots,
        *,
        penalty: Callable[[], Penalty],
        idle_seconds: float,
        head_seconds: float,
        max_header_bytes: int,
    ) -> None:
        super().__init__(
            handle,
            access_log=None,
            auto_decompress=False,
            max_line_size=max_header_bytes,
            max_field_size=max_header_bytes,
            keepalive_timeout=idle_seconds,
            lingering_time=2.0,
        )
        self.quick, self.slots, self.penalty = quick, slots, penalty
        self.max_head_bytes = max_header_bytes * _LINES_OF_FULL_SIZE
        self._idle_seconds, self._head_seconds = idle_seconds, head_seconds
        self._acceptor: Acceptor | None = None
        self._connecting: set[asyncio.Task[Any]] = set()

    def _make_request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return FrontRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())

    def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections from now on."""
        self._acceptor = Acceptor(sockets, self._take, self.slots.make_room)

    def stop(self) -> None:
        """Accept no more connections."""
        if self._acceptor is not None:
            self._acceptor.stop()

    async def sweep(self, task: Supervised) -> None:
        """Close connections that wait too long for their client, again and again."""
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._head_seconds / 4))
            now = monotonic()
            for number, connection in enumerate(self.slots):
                if number % 64 == 0:
                    await asyncio.sleep(0)
                if connection.is_late(now, self._idle_seconds, self._head_seconds):
                    connection.evict()
            task.succeeded()

    def _take(self, connection: socket.socket, address: Any) -> None:
        holder = FrontConnection(self, network_of_peer(address))
        if not self.slots.admit(holder):
            with contextlib.suppress(OSError):
                connection.send(_BUSY)
            connection.close()
            return
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_patience(connection, self._idle_seconds)
        task = asyncio.get_running_loop().create_task(self._connect(holder, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, holder: FrontConnection, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: holder, connection)
        except OSError:  # the connection has ended
            self.slots.leave(holder)

    def options(self) -> dict[str, Any]:
        """Return the arguments of each connection."""
        return dict(self._kwargs)


class FrontRequest(web.BaseRequest):
    """A request of a payer."""

    @property
    def keep_alive(self) -> bool:
        """Whether the connection goes on after the answer.

        Not after the offer of another protocol: aiohttp's parser drops the bytes that came in one piece with it, and
        the next request would be read from the middle. It keeps them for a WebSocket.
        """
        return not self._message.should_close and self.headers.get("Upgrade", "websocket").lower() == "websocket"


def connection_of(request: web.BaseRequest) -> FrontConnection:
    """Return the connection of a request of this listener."""
    if not isinstance(request.protocol, FrontConnection):
        raise TypeError(request.protocol)
    return request.protocol


class FrontConnection(web.RequestHandler):
    """One connection of a payer, and its slot (`SlotHolder`)."""

    __slots__ = (
        "_begun",
        "_blocked",
        "_delayed",
        "_front",
        "_heard",
        "_is_partial",
        "_parser_is_empty",
        "_partial_bytes",
        "network",
        "paid",
        "penalty",
    )

    def __init__(self, front: Front, network: str) -> None:
        super().__init__(front, loop=asyncio.get_running_loop(), **front.options())
        self._front, self.network, self.paid = front, network, False
        self.penalty = front.penalty()
        self._heard = monotonic()
        self._begun: float | None = self._heard
        """Since when a head is awaited that must arrive soon: the first of the connection, or one that has begun."""
        self._is_partial = False
        """Whether the parser has read a part of a head."""
        self._partial_bytes = 0
        self._parser_is_empty = True
        """Whether what the parser has read ends with a request. Bytes in it belong before the next ones."""
        self._blocked: float | None = None
        """Since when the client has not read what was written."""
        self._delayed: float | None = None
        """Since when it waits as a penalty."""

    @property
    def idle_since(self) -> float:
        """Monotonic time since which it waits for its client: for a request, for a body, or to read an answer."""
        if self._blocked is not None or self._delayed is not None:
            return self._blocked or self._delayed or self._heard
        request = self._current_request
        if request is None or (self._payload_parser is not None and not self.paid):
            return self._heard
        return WORKING if request.content.at_eof() or request.content.is_eof() else self._heard

    def evict(self) -> None:
        """Close it at once, without what its client did not read."""
        if self.transport is not None:
            self.transport.abort()
        self.force_close()

    async def delay(self, seconds: float) -> None:
        """Wait before an answer; requests behind it wait, too."""
        if seconds:
            self._delayed = monotonic()
            await asyncio.sleep(seconds)
            self._delayed = None

    async def penalise(self, error: PaychanError) -> None:
        """Count a refused payment, and delay its answer as the REST interface does (`penalty`)."""
        bad = isinstance(error, _AS_BAD_AS_A_SIGNATURE)
        await self.delay(self.penalty.bad_signature() if bad else self.penalty.refused(error))

    def pause_writing(self) -> None:
        self._blocked = monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._blocked = None
        super().resume_writing()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer bytes that are no request, without aiohttp's lines in the log: any stranger can send them."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        error = Malformed(field="request", reason="this is no HTTP that the server reads")
        response = web.json_response({"error": {"code": error.code, "message": str(error)}}, status=status)
        response.force_close()
        return response

    def is_late(self, now: float, idle_seconds: float, head_seconds: float) -> bool:
        """Say whether its client took too long for a head, or for its next request."""
        if self._current_request is not None or self._payload_parser is not None:
            self._begun = None
            return False
        if self._begun is not None and now - self._begun > head_seconds:
            return True
        return now - self._heard > idle_seconds

    def connection_lost(self, exc: BaseException | None) -> None:
        self._front.slots.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = monotonic()
        is_waiting = self._is_waiting
        if is_waiting and self._parser_is_empty and self._answered(data):
            self._begun = None
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            return
        super().data_received(data)
        self._parser_is_empty = data.endswith(b"\r\n\r\n")
        if is_waiting:
            self._is_partial = not self._messages
            self._partial_bytes = self._partial_bytes + len(data) if self._is_partial else 0
            if self._partial_bytes > self._front.max_head_bytes:
                self.evict()
            self._begun = (self._begun or self._heard) if self._is_partial else None

    @property
    def _is_waiting(self) -> bool:
        """Whether aiohttp waits for the next request. It does not between a head and the start of its handler."""
        return self._waiter is not None and not self._waiter.done() and self._payload_parser is None

    def _answered(self, data: bytes) -> bool:
        """Answer a plain request that has a price and no payment; False: leave it to the parser.

        A client that reads no answers is left to aiohttp, which waits for it before it reads another request.
        """
        if self._blocked is not None:
            return False
        if len(data) > _LONGEST_PLAIN or (plain := _PLAIN_HEAD.fullmatch(data)) is None or self.transport is None:
            return False
        method, target, lines = plain.groups()
        fields: dict[bytes, bytes] = {}
        for line in lines.split(b"\r\n")[:-1]:
            name, _, value = line.partition(b":")
            name = name.lower()
            if name in fields or (name in _NEED_THE_PARSER and value.strip().lower() != _KEEP_ALIVE):
                return False
            fields[name] = value.strip(b" \t")
        answer = self._front.quick(method.decode(), target.decode(), fields, time())
        if answer is None:
            return False
        self.transport.write(answer)
        return True


_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
