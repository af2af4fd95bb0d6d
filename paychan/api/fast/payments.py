"""Payments of the fast lane, between a plain request and its answer. The handlers' own functions do the work.

A channel whose actor is awake is asked at once, and the answer is written when its group is on disk: no task, no
coroutine. Whatever needs to wait for anything else (a channel that sleeps or is unknown, a 404's moment, where a channel
moved) is a task of the coroutines that the handlers await.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import Struct
from tornado.escape import parse_qs_bytes
from tornado.httputil import HTTPHeaders

from actors.channel import ChannelActor, PayBatch
from paychan.api import v1, v2
from paychan.api.fast.request_parser import NotFastPath, RequestParser
from paychan.api.response_heads import laid_out
from paychan.api.responses import OUTPOINT, Answer, outpoint, refusal, when_404s_leave
from paychan.api.service import Service
from paychan.api.urls import absolute, forwarded_protocol
from paychan.protocol.channel import Accepted, Outcome, Pay, Rejected
from paychan.protocol.errors import ChannelMoved, InternalError, NotFound, PaychanError
from paychan.protocol.payment import decode_v1
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.rbpcp import Dialect, read_v2_body

if TYPE_CHECKING:
    from paychan.api.fast.connection import Connection

log = structlog.get_logger("api")

_PATH = re.compile(rf"/(?:(v1)/channels/{OUTPOINT}(?:/pay)?|v2/channels/{OUTPOINT})")

_LOT = 32
"""Payments judged in one turn of the loop: the disk and everybody else get theirs between two lots."""

_MAX_QUERY_FIELDS = 1000
"""Tornado's own limit."""


class Payment:
    """A payment request as it came, and the place of its answer among those of its connection."""

    __slots__ = ("_connection", "answered", "began", "body", "closes", "head", "is_v1", "named", "query")

    def __init__(self, reader: RequestParser, connection: Connection, began: float) -> None:
        """Read the request's target. Raises `NotFastPath`: it is not a channel's, or its query is not for us to judge."""
        path, _, self.query = reader.url.partition(b"?")
        self.is_v1, self.named = _resource(path)
        if self.query.count(b"&") >= _MAX_QUERY_FIELDS:
            raise NotFastPath
        self._connection = connection
        self.head, self.body, self.closes = reader.head, reader.body, reader.closes
        self.began = began
        self.answered = b""
        """The whole answer, once it is there."""

    def answer(self, answer: Answer) -> None:
        """Lay the answer out; it is written when those before it are."""
        self.answered = laid_out(answer, self.closes)
        self._connection.flush()

    def refuse(self, error: PaychanError, answer: Answer) -> None:
        """Answer a refusal: after the time that it costs its connection, and a 404 at the moment of all 404s."""
        wait, now = self._connection.manners.refused(error), asyncio.get_running_loop().time()
        self._answer_after(wait, answer, when_404s_leave(self.began) if wait and isinstance(error, NotFound) else now)

    def accepted(self, answer: Answer, *, for_nothing: bool = False) -> None:
        """Answer a payment that was accepted: one that brought nothing after the time that this costs its connection."""
        self._connection.paid = True
        if not for_nothing:
            self._connection.manners.paid()
            self.answer(answer)
        else:
            self._answer_after(self._connection.manners.for_nothing(), answer, asyncio.get_running_loop().time())

    def _answer_after(self, seconds: float, answer: Answer, begin: float) -> None:
        if seconds:
            self._connection.hold(self, answer, begin + seconds)
        else:
            self.answer(answer)

    @property
    def own_address(self) -> Any:
        """Socket address at which the request arrived; None: the connection is gone."""
        return self._connection.transport.get_extra_info("sockname")

    @property
    def arguments(self) -> dict[str, list[bytes]]:
        """The fields of the query."""
        return parse_qs_bytes(self.query.decode("latin1"), keep_blank_values=True)

    def only_field(self, name: bytes) -> str | None:
        """Value of this field, if the query is nothing else and needs no unquoting, which is nearly always so."""
        query = self.query
        if not query.startswith(name) or b"&" in query or b"%" in query or b"+" in query or not query.isascii():
            return None
        return query[len(name) :].decode()


class _Asked(Struct):
    """What an actor is asked for a payment; without a dialect it is v1's."""

    payment: Payment
    actor: ChannelActor
    command: Pay
    dialect: Dialect | None = None


@lru_cache(20_000)
def _resource(path: bytes) -> tuple[bool, OutPoint]:
    """Whether a path is v1's, and the channel it names; a channel's is the same for all its payments. Raises `NotFastPath`."""
    match = _PATH.fullmatch(path.decode("latin1"))
    if match is None:
        raise NotFastPath
    is_v1 = match[1] is not None
    try:
        return is_v1, outpoint(*(match.group(2, 3) if is_v1 else match.group(4, 5)))
    except PaychanError:  # an output that can't be; the handlers say so
        raise NotFastPath from None


class PaymentProcessor:
    """Takes payments for one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.time = asyncio.get_running_loop().time
        self._taken: list[Payment] = []

    def take(self, payment: Payment) -> None:
        """Take a payment; it is answered later.

        Those that came in one turn of the loop are judged one behind the other, after they were read: what reads requests
        and what verifies signatures each stay in the processor's caches, which saves a tenth of the time.
        """
        if not self._taken:
            asyncio.get_running_loop().call_soon(self._judge_taken)
        self._taken.append(payment)

    def _judge_taken(self) -> None:
        """Judge so many, then let everybody else have their turn.

        All are read, then all signatures are checked, then all are booked. Several of one channel are judged together,
        as those of a stream's frame are.
        """
        taken, self._taken = self._taken[:_LOT], self._taken[_LOT:]
        if self._taken:
            asyncio.get_running_loop().call_soon(self._judge_taken)
        asked: dict[ChannelActor, list[_Asked]] = {}
        for payment in taken:
            ask = self._read(payment)
            if ask is not None:
                asked.setdefault(ask.actor, []).append(ask)
        if self.service.context.commits.overload() is None:
            for actor, asks in asked.items():
                if len(asks) == 1:
                    actor.look_ahead(asks[0].command.payment)
        for actor, asks in asked.items():
            self._give(actor, asks)

    def _read(self, payment: Payment) -> _Asked | None:
        """Read a payment, and find who judges it; None: it is answered here, now or later."""
        try:
            asked = self._asked_v1(payment) if payment.is_v1 else self._asked_v2(payment)
        except PaychanError as error:
            self._refuse(payment, error)
        except Exception:
            log.exception("payment failed")
            self._refuse(payment, InternalError())
        else:
            if asked is not None:
                return asked
            self._later(payment, partial(self._at_length, payment))
        return None

    def _asked_v1(self, payment: Payment) -> _Asked | None:
        """What the actor is to be asked; None: it sleeps, or is not for this caller, which takes its time."""
        actor, text = self.service.registry.reach(payment.named), payment.only_field(b"payment=")
        if actor is None:
            return None
        command = v1.command(payment.arguments) if text is None else Pay(decode_v1(text))
        return None if actor.channel.secret else _Asked(payment, actor, command)

    def _asked_v2(self, payment: Payment) -> _Asked | None:
        registry, named, text = self.service.registry, payment.named, payment.only_field(b"secret=")
        actor = registry.reach(named) or registry.reach(named.reversed)
        if actor is None:
            return None
        channel, body = actor.channel, read_v2_body(payment.body)
        if not (v2.knows_secret(channel, payment.arguments) if text is None else v2.is_secret(channel.secret, text)):
            return None
        return _Asked(payment, actor, v2.payment_command(self.service, channel, body), body.dialect)

    def _give(self, actor: ChannelActor, asks: Sequence[_Asked]) -> None:
        first = asks[0].command
        message = first if len(asks) == 1 else PayBatch([ask.command for ask in asks])
        try:
            self.service.registry.give(actor, message, partial(self._done, asks))
        except Exception:
            log.exception("payment failed")
            for ask in asks:
                self._refuse(ask.payment, InternalError())

    def _done(self, asks: Sequence[_Asked], given: Any) -> None:
        """The actor has answered."""
        try:
            outcomes: Sequence[Outcome] = [given.result()] if len(asks) == 1 else given.result()
        except (Exception, asyncio.CancelledError):
            log.exception("payment failed")
            outcomes = [Rejected(InternalError())] * len(asks)
        for ask, outcome in zip(asks, outcomes, strict=True):
            try:
                self._answer(ask, outcome)
            except Exception:
                log.exception("payment failed")
                self._refuse(ask.payment, InternalError())

    def _answer(self, ask: _Asked, outcome: Outcome) -> None:
        payment, dialect = ask.payment, ask.dialect
        if isinstance(outcome, Accepted):
            answer = v1.paid(outcome) if dialect is None else v2.paid(outcome, dialect)
            payment.accepted(answer, for_nothing=not outcome.value_sat)
        elif dialect is not None and isinstance(outcome.error, ChannelMoved):
            self._later(payment, partial(self._moved, payment, outcome.error, dialect))
        else:
            self._refuse(payment, outcome.error)

    def _refuse(self, payment: Payment, error: PaychanError) -> None:
        payment.refuse(error, refusal(error, quiet_404=not payment.is_v1))

    # --- what takes longer ------------------------------------------------------------------------------------------

    def _later(self, payment: Payment, work: Callable[[], Coroutine[Any, Any, Answer]]) -> None:
        self.service.keep(asyncio.get_running_loop().create_task(self._finish(payment, work)))

    async def _finish(self, payment: Payment, work: Callable[[], Coroutine[Any, Any, Answer]]) -> None:
        try:
            payment.accepted(await work())
        except PaychanError as error:
            self._refuse(payment, error)
        except Exception:
            log.exception("payment failed")
            self._refuse(payment, InternalError())

    async def _at_length(self, payment: Payment) -> Answer:
        if payment.is_v1:
            return await v1.pay(self.service, payment.named, payment.arguments)
        return await v2.pay(self.service, payment.named, payment.arguments, payment.body, partial(self._url, payment))

    async def _moved(self, payment: Payment, error: ChannelMoved, dialect: Dialect) -> Answer:
        named = payment.named
        if self.service.registry.reach(named) is None:
            named = named.reversed
        return await v2.moved_answer(self.service, named, error, dialect, partial(self._url, payment))

    def _url(self, payment: Payment, path: str) -> str:
        """Build an absolute URL for whoever sent this payment, as Tornado's handlers do."""
        http = self.service.config.http
        headers = HTTPHeaders.parse(payment.head.partition(b"\r\n")[2].decode("latin1"))
        protocol = forwarded_protocol(headers) if http.trust_forwarded else "http"
        return absolute(http, protocol, headers, payment.own_address, path)
