"""Processes the payments of the fast path, from a parsed request to its answer, with the functions of the handlers.

If the channel's actor is awake, the payment is submitted to it at once, and the answer is written when the commit group
is on disk; this needs no task and no coroutine. A payment that must wait for something else (its channel sleeps or is
unknown, or its new place must be looked up) runs in a task, with the coroutines that the handlers use.
"""

from __future__ import annotations

import asyncio
import re
from binascii import hexlify
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import lru_cache, partial
from hmac import compare_digest
from operator import attrgetter
from time import time
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import Struct
from tornado.escape import parse_qs_bytes
from tornado.httputil import HTTPHeaders

from actors.channel import ChannelActor, Payments
from paychan.api import v1, v2
from paychan.api.fast.request_parser import NotFastPath, RequestParser
from paychan.api.response_heads import Present, laid_out, update
from paychan.api.responses import OUTPOINT, Answer, outpoint, refusal, when_404s_leave
from paychan.api.service import Service
from paychan.api.urls import absolute
from paychan.protocol.channel import Accepted, Outcome, Pay, Rejected, State
from paychan.protocol.errors import ChannelMoved, InternalError, NotFound, PaychanError
from paychan.protocol.paying import Unverified, Verified, precheck, verify
from paychan.protocol.payment import decode_v1
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.rbpcp import ChannelStatus, Dialect, PaymentResult, encode_json, read_v2_body
from paychan.tracing import NUMBERS, REQUEST, continue_request, enter_channel, leave_channel

if TYPE_CHECKING:
    from paychan.api.fast.connection import Connection

log = structlog.get_logger("api")

_PATH = re.compile(rf"/(?:(v1)/channels/{OUTPOINT}(?:/pay)?|v2/channels/{OUTPOINT})")

_BATCH_SIZE = 32
"""Payments judged in one turn of the loop; between two batches the loop serves the disk and other clients."""

_MAX_QUERY_FIELDS = 1000
"""Tornado's own limit."""


class Payment:
    """A payment request, and the place of its answer in the order of its connection."""

    __slots__ = ("answered", "began", "body", "closes", "connection", "head", "is_v1", "named", "query")

    def __init__(self, reader: RequestParser, connection: Connection, began: float) -> None:
        """Read the request's target. Raises `NotFastPath`: it is not a channel's, or its query has too many fields."""
        path, _, self.query = reader.url.partition(b"?")
        self.is_v1, self.named = _resource(path)
        if self.query.count(b"&") >= _MAX_QUERY_FIELDS:
            raise NotFastPath
        self.connection = connection
        self.head, self.body, self.closes = reader.head, reader.body, reader.closes
        self.began = began
        self.answered = b""
        """The bytes of the answer; empty until it is ready."""

    def answer(self, answer: Answer) -> None:
        """Set the answer; it is written after the answers before it."""
        self.answered = laid_out(answer, self.closes)
        self.connection.flush()

    def refuse(self, error: PaychanError, answer: Answer) -> None:
        """Answer a refusal after the delay of the connection's penalty.

        For a 404 that delay starts at `when_404s_leave`.
        """
        wait, now = self.connection.penalty.refused(error), asyncio.get_running_loop().time()
        self._answer_after(wait, answer, when_404s_leave(self.began) if wait and isinstance(error, NotFound) else now)

    def accepted(self, answer: Answer, *, no_value: bool = False) -> None:
        """Answer an accepted payment; one of no value is delayed by the connection's penalty."""
        self.connection.paid = True
        if not no_value:
            self.connection.penalty.paid()
            self.answer(answer)
        else:
            self._answer_after(self.connection.penalty.no_value(), answer, asyncio.get_running_loop().time())

    def _answer_after(self, seconds: float, answer: Answer, begin: float) -> None:
        if seconds:
            self.connection.hold(self, answer, begin + seconds)
        else:
            self.answer(answer)

    @property
    def own_address(self) -> Any:
        """Socket address at which the request arrived, or None if the connection is gone."""
        return self.connection.transport.get_extra_info("sockname")

    @property
    def arguments(self) -> dict[str, list[bytes]]:
        """The fields of the query."""
        return parse_qs_bytes(self.query.decode("latin1"), keep_blank_values=True)

    def only_field(self, name: bytes) -> str | None:
        """Return the value of a query's only field; `name` ends with `=`.

        Returns None if the query has other fields or escapes, which is rare.
        """
        query = self.query
        if not query.startswith(name) or b"&" in query or b"%" in query or b"+" in query or not query.isascii():
            return None
        return query[len(name) :].decode()


class _Submission(Struct):
    """A payment request with its channel's actor and its command. The dialect is None for v1."""

    payment: Payment
    actor: ChannelActor
    command: Pay
    dialect: Dialect | None = None
    step: Unverified | Verified | None = None
    """The last step that the payment passed before it reaches the actor; None: the actor takes all steps."""


_COMMAND = attrgetter("command")


@lru_cache(20_000)
def _resource(path: bytes) -> tuple[bool, OutPoint]:
    """Return whether a path is of v1, and its channel.

    Cached, as all payments of a channel have one path. Raises `NotFastPath`.
    """
    match = _PATH.fullmatch(path.decode("latin1"))
    if match is None:
        raise NotFastPath
    is_v1 = match[1] is not None
    try:
        return is_v1, outpoint(*(match.group(2, 3) if is_v1 else match.group(4, 5)))
    except PaychanError:  # an impossible outpoint; the handlers answer that
        raise NotFastPath from None


class PaymentProcessor:
    """Processes payments for one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.time = asyncio.get_running_loop().time
        self._actors = service.registry.actors
        self._received: list[Payment] = []

    def submit(self, payment: Payment) -> None:
        """Queue a payment; it is answered later."""
        if not self._received:
            asyncio.get_running_loop().call_soon(self._judge_received)
        self._received.append(payment)

    def _judge_received(self) -> None:
        """Take one batch of queued payments through the steps of `protocol.paying`; the rest waits for a later turn.

        Each step is taken for all payments before the next one begins. Code and data of a step then stay in the CPU's
        caches, which saves a tenth of the time. Payments of the same channel go to its actor together, like the
        payments of a stream's frame.
        """
        received, self._received = self._received[:_BATCH_SIZE], self._received[_BATCH_SIZE:]
        if self._received:
            asyncio.get_running_loop().call_soon(self._judge_received)
        by_actor: dict[ChannelActor, list[_Submission]] = {}
        for payment in received:
            submission = self._read(payment)
            if submission is not None:
                by_actor.setdefault(submission.actor, []).append(submission)
        self._precheck(by_actor.values())
        self._verify(by_actor.values())
        for actor, submissions in by_actor.items():
            if submissions:
                self._tell(actor, submissions)

    def _precheck(self, groups: Iterable[list[_Submission]]) -> None:
        """Take the first step of payments that are alone for their channel.

        A refused payment is answered, and leaves its group.
        """
        context = self.service.context
        if context.rules.asks_application or context.commits.overload() is not None:
            return  # the actors answer that
        seen = context.chain_view
        shared = None if seen.in_danger or seen.unasked else context.view()
        for submissions in groups:
            first = submissions[0]
            channel = first.actor.channel
            if len(submissions) > 1 or channel.offered is not None:
                continue
            try:
                checked = precheck(channel, first.command, shared or context.view(channel.outpoint))
            except Exception:
                log.exception("payment failed", channel=str(channel.outpoint))
                checked = Rejected(InternalError())
            if isinstance(checked, Unverified):
                first.step = checked
            elif isinstance(checked, Rejected):
                submissions.clear()
                self._reply(first, checked)

    def _verify(self, groups: Iterable[list[_Submission]]) -> None:
        """Take the second step of the payments that passed the first one."""
        for submissions in groups:
            if not submissions or not isinstance(unverified := submissions[0].step, Unverified):
                continue
            first = submissions[0]
            verified: Verified | Rejected
            try:
                verified = verify(unverified, first.actor.verifier)
            except Exception:
                log.exception("payment failed", channel=str(unverified.channel.outpoint))
                verified = Rejected(InternalError())
            if isinstance(verified, Verified):
                first.step = verified
            else:
                submissions.clear()
                self._reply(first, verified)

    def _read(self, payment: Payment) -> _Submission | None:
        """Read a payment and find its actor; None: this method has answered it, or a task will."""
        try:
            submission = self._submission_v1(payment) if payment.is_v1 else self._submission_v2(payment)
        except PaychanError as error:
            self._refuse(payment, error)
        except Exception:
            log.exception("payment failed")
            self._refuse(payment, InternalError())
        else:
            if submission is not None:
                return submission
            self._run_later(payment, partial(self._pay_slowly, payment))
        return None

    def _submission_v1(self, payment: Payment) -> _Submission | None:
        """Make the submission of a v1 payment.

        Returns None if the actor sleeps or the channel is of v2; then `_pay_slowly` answers the payment.
        """
        actor, text = self._actors.get(payment.named), payment.only_field(b"payment=")
        if actor is None or not actor.alive:
            return None
        command = v1.command(payment.arguments) if text is None else Pay(decode_v1(text))
        return None if actor.channel.secret else _Submission(payment, actor, command)

    def _submission_v2(self, payment: Payment) -> _Submission | None:
        """Make the submission of a v2 payment.

        Returns None if the actor sleeps or the secret is wrong; then `_pay_slowly` answers the payment.
        """
        named = payment.named
        actor = self._actors.get(named) or self._actors.get(named.reversed)
        if actor is None or not actor.alive:
            return None
        channel, body = actor.channel, read_v2_body(payment.body)
        usual = compare_digest(payment.query, b"secret=" + hexlify(channel.secret)) and channel.secret
        if not usual and not v2.knows_secret(channel, payment.arguments):
            return None
        if body.names_more:
            command = v2.payment_command(self.service, channel, body)
        else:
            command = Pay(body.payment, body.application_data)
        return _Submission(payment, actor, command, body.dialect)

    def _tell(self, actor: ChannelActor, submissions: list[_Submission]) -> None:
        """Send the payments to their channel's actor; `_answer` is called when their outcomes are final."""
        verified = submissions[0].step
        message = Payments([*map(_COMMAND, submissions)], partial(self._answer, submissions))
        if isinstance(verified, Verified):
            message.verified = verified
        self.service.registry.unanswered += 1
        actor.tell(message)

    def _answer(self, submissions: Sequence[_Submission], message: Payments) -> None:
        """Answer the payments with the outcomes of their actor."""
        self.service.registry.unanswered -= 1
        for submission, outcome in zip(submissions, message.outcomes, strict=True):
            self._reply(submission, outcome)

    def _reply(self, submission: _Submission, outcome: Outcome) -> None:
        """Answer one payment; a bug in its answer leaves the others of its turn alone."""
        payment, dialect = submission.payment, submission.dialect
        try:
            if isinstance(outcome, Accepted):
                if outcome.value_sat and outcome.channel.state is State.OPEN and not outcome.application_data:
                    self._reply_as_usual(payment, outcome, dialect)
                    return
                answer = v1.paid(outcome) if dialect is None else v2.paid(outcome, dialect)
                payment.accepted(answer, no_value=not outcome.value_sat)
            elif dialect is not None and isinstance(outcome.error, ChannelMoved):
                self._run_later(payment, partial(self._moved, payment, outcome.error, dialect))
            else:
                self._refuse(payment, outcome.error, submission.actor)
        except Exception:
            log.exception("payment failed")
            self._refuse(payment, InternalError())

    def _reply_as_usual(self, payment: Payment, outcome: Accepted, dialect: Dialect | None) -> None:
        """Answer a payment of some value on an open channel, with the same bytes as the handlers."""
        change_sat, value_sat, connection = outcome.channel.payment.change_sat, outcome.value_sat, payment.connection
        if dialect is None:
            result = PaymentResult(ChannelStatus.OPEN, change_sat, value_sat, None)
        else:
            txid = "" if dialect is Dialect.S else None
            result = PaymentResult(ChannelStatus.OPEN, change_sat, value_sat, txid, "")
        body, second = encode_json(result), int(time())
        if second != Present.second:
            update(second)
        end = b"\r\nConnection: close\r\n\r\n" if payment.closes else b"\r\n\r\n"
        payment.answered = b"%b%d%b%b\n" % (Present.accepted, len(body) + 1, end, body)
        connection.paid = True
        if connection.penalty.allowance is not None:
            connection.penalty.paid()
        connection.flush()

    def _refuse(self, payment: Payment, error: PaychanError, actor: ChannelActor | None = None) -> None:
        """Answer a refusal; `actor` is that of the channel, if the payment reached its rules."""
        request, channel = REQUEST.set(REQUEST.get() or next(NUMBERS)), enter_channel(payment.named)
        if actor is not None:
            self.service.registry.report_refusals(actor.channel.outpoint, (Rejected(error),))
        self.service.context.observers.report_refusal(error.code)
        payment.refuse(error, refusal(error, quiet_404=not payment.is_v1))
        leave_channel(channel)
        REQUEST.reset(request)

    # --- payments that need a task ----------------------------------------------------------------------------------

    def _run_later(self, payment: Payment, work: Callable[[], Coroutine[Any, Any, Answer]]) -> None:
        self.service.keep(asyncio.get_running_loop().create_task(self._finish(payment, work)))

    async def _finish(self, payment: Payment, work: Callable[[], Coroutine[Any, Any, Answer]]) -> None:
        continue_request()
        enter_channel(payment.named)
        try:
            payment.accepted(await work())
        except PaychanError as error:
            self._refuse(payment, error)
        except Exception:
            log.exception("payment failed")
            self._refuse(payment, InternalError())

    async def _pay_slowly(self, payment: Payment) -> Answer:
        if payment.is_v1:
            return await v1.pay(self.service, payment.named, payment.arguments)
        return await v2.pay(self.service, payment.named, payment.arguments, payment.body, partial(self._url, payment))

    async def _moved(self, payment: Payment, error: ChannelMoved, dialect: Dialect) -> Answer:
        named = payment.named
        if self.service.registry.find_awake(named) is None:
            named = named.reversed
        return await v2.moved_answer(self.service, named, error, dialect, partial(self._url, payment))

    def _url(self, payment: Payment, path: str) -> str:
        """Build an absolute URL for the client of this payment, as Tornado's handlers do."""
        headers = HTTPHeaders.parse(payment.head.partition(b"\r\n")[2].decode("latin1"))
        return absolute(self.service.config.http, headers, payment.own_address, path)
