"""One client's connection on the fast path: parses requests, and writes the answers in the order of the requests.

Plain payment requests (`request_parser`) begin at once; at most `MOST_IN_PROGRESS` of them are in progress at a time. Any
other request waits until the requests before it are answered. If it begins a stream, the connection then becomes a
WebSocket (`stream.upgrade`). Otherwise Tornado serves it (`fallback`), and the connection returns here. Reading pauses
while that many payments are in progress, while the client does not read its answers, and during a fallback. So a client
that sends faster fills the buffers of the kernel, not the memory of the server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from paychan.api.budgets.connection_slots import WORKING, network_of_peer
from paychan.api.budgets.head_limits import size_of_body, size_of_head
from paychan.api.budgets.penalty import Penalty
from paychan.api.fast.fallback import Fallback
from paychan.api.fast.payments import Payment, PaymentProcessor
from paychan.api.fast.request_parser import NotFastPath, RequestParser
from paychan.api.response_heads import laid_out
from paychan.api.responses import Answer, refusal
from paychan.api.stream.upgrade import Upgrade, read_request
from paychan.protocol.errors import PaychanError

if TYPE_CHECKING:
    from paychan.api.fast.server import FastServer
    from paychan.api.stream.reader import WebSocket

MOST_IN_PROGRESS = 16
"""Payments in progress on one connection. A higher number does not speed up a client, and delays other clients."""

_HIGH_WATER_BYTES = 65_536

_PARTING_SECONDS = 1.0


class Connection(asyncio.Protocol):
    """The asyncio protocol of one connection; it runs on the event loop's thread."""

    __slots__ = (
        "_awaited_bytes",
        "_buffer",
        "_choked",
        "_ends",
        "_evicted",
        "_fallback",
        "_head_since",
        "_held",
        "_in_progress",
        "_made",
        "_processor",
        "_queues",
        "_reader",
        "_reads",
        "_server",
        "_since",
        "_works",
        "address",
        "detached",
        "evictor",
        "network",
        "paid",
        "penalty",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, server: FastServer, processor: PaymentProcessor, address: Any) -> None:
        http = processor.service.config.http
        self._server, self._processor = server, processor
        self.address, self.network = address, network_of_peer(address)
        self._reader = RequestParser(http.max_header_bytes, http.max_body_bytes)
        self._buffer = b""
        self._in_progress: deque[Payment] = deque()
        self._reads, self._choked, self._ends, self._evicted = True, False, False, False
        self._held = 0
        self._awaited_bytes = 0
        """Size of a request that Tornado will read, whose body has not arrived completely; 0: there is none."""
        self._queues = False
        self._made = self._since = monotonic()
        self._head_since: float | None = None
        self._fallback: Fallback | Upgrade | None = None
        """The request that is served alone: by Tornado, or because it begins a stream."""
        self._works = False
        self.detached, self.paid = False, False
        self.evictor: Any = None
        self.penalty = Penalty(http.max_bad_signatures, closes=not http.trust_forwarded)

    # --- what asyncio calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._evicted:
            self.transport.abort()
            return
        self.transport.set_write_buffer_limits(_HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._ends:
            return
        self._buffer = self._buffer + data if self._buffer else data
        self._advance()

    def eof_received(self) -> bool:
        """The client has closed its sending side; it still gets the answers to its requests."""
        self._ends = True
        self._advance()
        return True  # the transport stays open for the answers

    def pause_writing(self) -> None:
        self._choked, self._since = True, monotonic()
        self._advance()

    def resume_writing(self) -> None:
        self._choked = False
        self.transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Free the slot. Payments in progress continue; their answers are discarded."""
        self._buffer, self._ends = b"", True
        self._server.forget(self)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Begin the received requests that may begin now; pause or resume reading; close a finished connection."""
        self._queues = False
        while self._buffer and self._may_begin and self._begin():
            pass
        wants_more = self._may_begin and not (self._ends or self._queues or self._fallback)
        if wants_more is not self._reads and not self.transport.is_closing():
            self._reads = wants_more
            (self.transport.resume_reading if wants_more else self.transport.pause_reading)()
        if self._ends and self._is_done and not self.transport.is_closing():
            self.transport.close()  # the transport sends its buffer first

    @property
    def _may_begin(self) -> bool:
        if self._held or self._choked or self._fallback is not None:
            return False
        return len(self._in_progress) < (1 if self.penalty.bad else MOST_IN_PROGRESS)

    @property
    def _is_done(self) -> bool:
        """Whether no request is in progress, and no received request can begin."""
        return not (self._in_progress or self._fallback or self._held or (self._choked and self._buffer))

    def _begin(self) -> bool:
        """Begin the next request if it is complete; return whether another one may follow."""
        reader = self._reader
        if len(self._buffer) < self._awaited_bytes:
            return False
        if self._server.conn_params.no_keep_alive or not self._server.takes_payments:
            return self._leave_fast_path()  # if the server is stopping, Tornado writes the answers for that
        try:
            size = reader.read(self._buffer)
            if not size:
                if reader.has_new_head():
                    self._since = monotonic()  # the timeout of the body starts
                return False
            payment = Payment(reader, self, self._processor.time())
        except NotFastPath:
            return self._leave_fast_path()
        self._buffer = self._buffer[size:]
        self._in_progress.append(payment)
        if payment.closes:
            self._buffer, self._ends = b"", True
        if self.penalty.bad and (problem := self.penalty.problem()) is not None:
            self._end_with(payment, refusal(problem, quiet_404=False))
        else:
            self._processor.submit(payment)
        return True

    # --- answers ----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the answers that are ready, in the order of the requests, up to the first that is not ready."""
        in_progress = self._in_progress
        if self.transport.is_closing():
            in_progress.clear()
            return
        full = len(in_progress) >= MOST_IN_PROGRESS
        while in_progress and in_progress[0].answered:
            self.transport.write(in_progress.popleft().answered)
        if not in_progress:
            self._since = monotonic()
        if self._buffer or full or self._ends or not self._reads:
            self._advance()

    def _end_with(self, payment: Payment, answer: Answer) -> None:
        """Close the connection after an answer; later requests are discarded."""
        self._buffer, self._ends, payment.closes = b"", True, True
        payment.answer(answer)

    def hold(self, payment: Payment, answer: Answer, until: float) -> None:
        """Delay an answer, and the whole connection, until this time of the loop's clock."""
        self._held += 1
        asyncio.get_running_loop().call_at(until, self._release, payment, answer)
        self._advance()

    def _release(self, payment: Payment, answer: Answer) -> None:
        self._held -= 1
        payment.answer(answer)

    # --- fallback ---------------------------------------------------------------------------------------------------

    def _leave_fast_path(self) -> bool:
        """Serve the next request alone, once it has arrived and all answers before it are sent."""
        self._reader.reset()
        size = 0
        problem: PaychanError | None = None
        try:
            size = size_of_head(self._buffer, self._server.conn_params.max_header_size)
            if not size or not self._has_body(size):
                return False
        except PaychanError as error:
            problem = error
        self._queues = True
        if self._in_progress:
            return False
        if self.transport.get_write_buffer_size():
            self.transport.set_write_buffer_limits(0)  # so that asyncio calls `resume_writing` when all is sent
            return False
        problem = problem or self._processor.service.memory.any_work()
        if problem is not None:
            self._part(problem)
            return False
        begun, self._buffer, self._awaited_bytes = self._buffer, b"", 0
        request = read_request(begun[:size], begun[size:])
        if request is None:
            self._fallback = Fallback(self._server, self, begun)
        else:
            self._fallback = Upgrade(self._processor.service, self, request)
        self._since = monotonic()
        self._server.fallback_queue.begin(self.network, self._fallback.begin, has_paid=self.paid)
        return False

    def _has_body(self, head: int) -> bool:
        """Say whether the body of the request has arrived, if its size is known and within the limit.

        Tornado would read a body that arrives slowly, too, at the cost of a stream and a descriptor for all this time.
        """
        if not self._awaited_bytes:
            body = size_of_body(self._buffer[:head])
            if body <= self._processor.service.config.http.max_body_bytes:
                self._awaited_bytes, self._since = head + body, monotonic()  # the timeout of the body starts
        return len(self._buffer) >= self._awaited_bytes

    def _part(self, problem: PaychanError) -> None:
        """Refuse the next request.

        Close after a second, because a close at once could reset the connection before the answer.
        """
        self._buffer, self._ends = b"", True
        self.transport.write(laid_out(refusal(problem, quiet_404=False), closes=True))
        self.transport.write_eof()
        self._held += 1
        asyncio.get_running_loop().call_later(_PARTING_SECONDS, self._depart)

    def _depart(self) -> None:
        self._held -= 1
        self._advance()

    def come_back(self, rest: bytes) -> None:
        """Continue after a request that Tornado has served, with the bytes that Tornado read after it."""
        self._fallback, self._since, self._works = None, monotonic(), False
        self._buffer = rest
        self._advance()

    def become(self, websocket: WebSocket, head: bytes, rest: bytes) -> None:
        """Hand this connection to a WebSocket, which writes `head` and reads `rest` first; it keeps the slot."""
        if self.transport.is_closing():
            websocket.abort()
            return
        self._fallback, self.detached = None, True
        websocket.on_lost = partial(self._server.slots.leave, self)
        websocket.begins_with(head, rest)
        self.transport.set_protocol(websocket)
        self.transport.resume_reading()
        websocket.connection_made(self.transport)  # may pause reading again: `rest` may be more than it buffers

    def close_after(self, answer: bytes) -> None:
        """Write an answer and close."""
        self._buffer, self._ends = b"", True
        self.transport.write(answer)
        self.come_back(b"")

    # --- limits -----------------------------------------------------------------------------------------------------

    @property
    def idle_since(self) -> float:
        """Monotonic time since which it waits for its client; see `SlotHolder`."""
        works = self._works or (self._in_progress and not self._choked and not self._held)
        return WORKING if works else self._since

    def start_work(self) -> None:
        """A handler begins to work for the request at Tornado, or for the stream that this connection became."""
        self._works = True

    def end_work(self) -> None:
        """The handler is done, or it delays the answer as a penalty."""
        self._works, self._since = False, monotonic()

    def evict(self) -> None:
        """Close it, because another connection needs the slot."""
        self._evicted = True
        if self.evictor is not None:
            self.evictor()
        elif self._fallback is not None:
            self._fallback.abort()
        if hasattr(self, "transport"):
            self.transport.abort()

    def check_time(self, now: float, idle_seconds: float, head_seconds: float, body_seconds: float) -> None:
        """Close the connection if its client is too slow to send a request, a head or a body, or to read its answers.

        `now` is a monotonic time; all arguments are in seconds.
        """
        if self._fallback is not None or (self._in_progress and not self._choked) or self._held or self.detached:
            return
        since, patience = self._since, idle_seconds
        if self._choked:
            pass
        elif self._reader.in_body or self._awaited_bytes:
            patience = body_seconds
        elif self._buffer:  # a part of the head has arrived
            self._head_since = self._head_since or now
            since, patience = max(self._head_since, since), head_seconds
        else:
            self._head_since = None
            if since == self._made:  # nothing has arrived yet
                patience = head_seconds
        if since < now - patience and hasattr(self, "transport"):
            self.transport.abort()

    async def close(self, *, streams_too: bool) -> None:
        """Close it now, also if requests are in progress.

        A connection that became a stream is closed only if `streams_too`, after the time for its close frame.
        """
        if self.detached:
            if streams_too:
                self._server.slots.leave(self)
                self.evict()
            return
        if self._fallback is not None:
            await self._fallback.close()
        if hasattr(self, "transport"):
            self.transport.abort()
