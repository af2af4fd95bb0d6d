"""One client's connection on the fast lane: its bytes become requests, and answers leave in the order of the requests.

Plain payments (`plain`) are begun here at once and may be under way side by side, a few at a time. Any other request
waits until those before it are answered, then takes the `detour` through Tornado; after it the connection is back here.
Reading stops while as many payments are under way as may be, while the client does not take its answers, and on a detour,
so a client that sends more than it may fills the kernel's buffers and not ours.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from paychan.api.budgets.connection_slots import WORKING, network_of_peer
from paychan.api.budgets.head_limits import size_of_head
from paychan.api.budgets.penalty import Penalty
from paychan.api.fast.fallback import Fallback
from paychan.api.fast.payments import Payment, PaymentProcessor
from paychan.api.fast.request_parser import NotFastPath, RequestParser
from paychan.api.response_heads import laid_out
from paychan.api.responses import Answer, refusal
from paychan.protocol.errors import PaychanError

if TYPE_CHECKING:
    from paychan.api.fast.server import FastServer

MOST_UNDER_WAY = 16
"""Payments of one connection at a time. More gain nothing for a client, and delay everybody else's."""

_HIGH_WATER_BYTES = 65_536

_PARTING_SECONDS = 1.0


class Connection(asyncio.Protocol):
    """asyncio's view of it: one for each connection, all on the event loop's thread."""

    __slots__ = (
        "_buffer",
        "_choked",
        "_detour",
        "_ends",
        "_evicted",
        "_head_since",
        "_held",
        "_made",
        "_processor",
        "_queues",
        "_reader",
        "_reads",
        "_server",
        "_since",
        "_under_way",
        "_works",
        "address",
        "detached",
        "evictor",
        "manners",
        "network",
        "paid",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, server: FastServer, processor: PaymentProcessor, address: Any) -> None:
        http = processor.service.config.http
        self._server, self._processor = server, processor
        self.address, self.network = address, network_of_peer(address)
        self._reader = RequestParser(http.max_header_bytes, http.max_body_bytes)
        self._buffer = b""
        self._under_way: deque[Payment] = deque()
        self._reads, self._choked, self._ends, self._evicted = True, False, False, False
        self._held = 0
        self._queues = False
        self._made = self._since = monotonic()
        self._head_since: float | None = None
        self._detour: Fallback | None = None
        self._works = False
        self.detached, self.paid = False, False
        self.evictor: Any = None
        self.manners = Penalty(http.max_bad_signatures, closes=not http.trust_forwarded)

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
        """The client sends nothing more; it gets the answers to what it has sent."""
        self._ends = True
        self._advance()
        return True  # the transport stays open until we close it

    def pause_writing(self) -> None:
        self._choked, self._since = True, monotonic()
        self._advance()

    def resume_writing(self) -> None:
        self._choked = False
        self.transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Payments under way go on; their answers find nobody."""
        self._buffer, self._ends = b"", True
        self._server.forget(self)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Begin the requests that have come, as far as they may begin."""
        self._queues = False
        while self._buffer and self._may_begin and self._begin():
            pass
        wants_more = self._may_begin and not (self._ends or self._queues or self._detour)
        if wants_more is not self._reads and not self.transport.is_closing():
            self._reads = wants_more
            (self.transport.resume_reading if wants_more else self.transport.pause_reading)()
        if self._ends and self._is_done and not self.transport.is_closing():
            self.transport.close()  # when all that was written is sent

    @property
    def _may_begin(self) -> bool:
        if self._held or self._choked or self._detour is not None:
            return False
        return len(self._under_way) < (1 if self.manners.bad else MOST_UNDER_WAY)

    @property
    def _is_done(self) -> bool:
        """Whether nothing is under way, and nothing that has come can begin."""
        return not (self._under_way or self._detour or self._held or (self._choked and self._buffer))

    def _begin(self) -> bool:
        """Begin the next request, if it has come whole; say whether to go on."""
        reader = self._reader
        if self._server.conn_params.no_keep_alive:  # the server is stopping, and Tornado knows how to say so
            return self._leave_lane()
        try:
            size = reader.read(self._buffer)
            if not size:
                if reader.has_new_head():
                    self._since = monotonic()  # the body has its own time
                return False
            payment = Payment(reader, self, self._processor.time())
        except NotFastPath:
            return self._leave_lane()
        self._buffer = self._buffer[size:]
        self._under_way.append(payment)
        if payment.closes:
            self._buffer, self._ends = b"", True
        if self.manners.bad and (problem := self.manners.problem()) is not None:
            self._end_with(payment, refusal(problem, quiet_404=False))
        else:
            self._processor.take(payment)
        return True

    # --- answers ----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the answers that are there, up to the first that is not: they leave in the order of the requests."""
        under_way = self._under_way
        if self.transport.is_closing():
            under_way.clear()
            return
        full = len(under_way) >= MOST_UNDER_WAY
        while under_way and under_way[0].answered:
            self.transport.write(under_way.popleft().answered)
        if not under_way:
            self._since = monotonic()
        if self._buffer or full or self._ends or not self._reads:
            self._advance()

    def _end_with(self, payment: Payment, answer: Answer) -> None:
        """Close the connection behind an answer; nothing that came after is looked at."""
        self._buffer, self._ends, payment.closes = b"", True, True
        payment.answer(answer)

    def hold(self, payment: Payment, answer: Answer, until: float) -> None:
        """Let an answer wait until this moment of the loop's clock, and the connection with it."""
        self._held += 1
        asyncio.get_running_loop().call_at(until, self._release, payment, answer)
        self._advance()

    def _release(self, payment: Payment, answer: Answer) -> None:
        self._held -= 1
        payment.answer(answer)

    # --- the detour -------------------------------------------------------------------------------------------------

    def _leave_lane(self) -> bool:
        """Let Tornado read the next request, when its head has come whole and everything before it is answered and sent."""
        self._reader.reset()
        problem: PaychanError | None = None
        try:
            if not size_of_head(self._buffer, self._server.conn_params.max_header_size):
                return False
        except PaychanError as error:
            problem = error
        self._queues = True
        if self._under_way:
            return False
        if self.transport.get_write_buffer_size():
            self.transport.set_write_buffer_limits(0)  # so that `resume_writing` comes when all is sent
            return False
        problem = problem or self._processor.service.memory.any_work()
        if problem is not None:
            self._part(problem)
            return False
        begun, self._buffer = self._buffer, b""
        self._detour = Fallback(self._server, self, begun)
        self._since = monotonic()
        self._server.detours.begin(self.network, self._detour.begin)
        return False

    def _part(self, problem: PaychanError) -> None:
        """Refuse what is not read, and close when the client has had time to read that: closing at once could destroy it."""
        self._buffer, self._ends = b"", True
        self.transport.write(laid_out(refusal(problem, quiet_404=False), closes=True))
        self.transport.write_eof()
        self._held += 1
        asyncio.get_running_loop().call_later(_PARTING_SECONDS, self._depart)

    def _depart(self) -> None:
        self._held -= 1
        self._advance()

    def come_back(self, rest: bytes) -> None:
        """Go on behind the request that took the detour, with what was read behind it."""
        self._detour, self._since, self._works = None, monotonic(), False
        self._buffer = rest
        self._advance()

    # --- limits -----------------------------------------------------------------------------------------------------

    @property
    def waits_since(self) -> float:
        """Monotonic time since which it waits for its client, see `places.Guest`."""
        works = self._works or (self._under_way and not self._choked and not self._held)
        return WORKING if works else self._since

    def begins(self) -> None:
        """A handler begins to work for the request on the detour, or for the stream that it became."""
        self._works = True

    def rests(self) -> None:
        """It waits for the client, or lets the client wait."""
        self._works, self._since = False, monotonic()

    def evict(self) -> None:
        """Close it, for another connection needs the place."""
        self._evicted = True
        if self.evictor is not None:
            self.evictor()
        elif self._detour is not None:
            self._detour.abort()
        if hasattr(self, "transport"):
            self.transport.abort()

    def check_time(self, now: float, idle_seconds: float, head_seconds: float, body_seconds: float) -> None:
        """Close what waits too long for a request, for its head or body, or for its answers to be taken."""
        if self._detour is not None or (self._under_way and not self._choked) or self._held or self.detached:
            return
        since, patience = self._since, idle_seconds
        if self._choked:
            pass
        elif self._reader.in_body:
            patience = body_seconds
        elif self._buffer:  # the head has begun to come
            self._head_since = self._head_since or now
            since, patience = max(self._head_since, since), head_seconds
        else:
            self._head_since = None
            if since == self._made:  # nothing has come yet
                patience = head_seconds
        if since < now - patience and hasattr(self, "transport"):
            self.transport.abort()

    async def close(self, *, streams_too: bool) -> None:
        """End it now, whatever is under way; a stream only if it had time to say goodbye."""
        if self.detached:
            if streams_too:
                self._server.places.leave(self)
                self.evict()
            return
        if self._detour is not None:
            await self._detour.close()
        if hasattr(self, "transport"):
            self.transport.abort()
