"""The merchant interface: JSON over HTTP/1.1 for the seller's own programs, on a listener of its own.

`paychan.sell` is the client. A program asks for a 402 (`/offer`), charges a payment (`/charge`), gives back what was not
delivered (`/release`), and says that its answer has begun to leave (`/done`). A program that is lost between charge and
answer leaves the charge in the channel's record: the payer repeats the request, and it is not charged again.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache, partial
from time import monotonic, time
from typing import TypeAlias, TypeVar

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct

from paychan.gateway.asking import Facts
from paychan.gateway.cashier import Asked, Cashier, Closed, Paid, brings_payment, ends_channel, outcome_header
from paychan.gateway.cashier import Refusal as Refused
from paychan.gateway.charging import Charged
from paychan.gateway.offering import Answer, Offering, refusal
from paychan.gateway.pricefile import Timeouts
from paychan.gateway.prices import Route
from paychan.gateway.underway import Key, UnderWay
from paychan.protocol.errors import (
    BodyTooLarge,
    InternalError,
    Malformed,
    MethodNotAllowed,
    NoSuchRoute,
    PaychanError,
    SignerUnavailable,
)
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.unpaid import AlreadyDelivered, MerchantTokenWrong, RequestUnderWay
from paychan.protocol.wire import merchant as wire

_RETRY_AFTER_SECONDS = "1"

log = structlog.get_logger("merchant")

AddRoutes: TypeAlias = Callable[[web.UrlDispatcher], None]
"""Adds routes of another kind of interface to the same listener."""

_Message = TypeVar("_Message", wire.Ask, wire.Release, wire.Done)


class Merchant:
    """Answers sellers' programs; `respond` is free of HTTP.

    Args:
        cashier: charges payments.
        offering: makes 402 answers.
        under_way: requests that programs are serving.
        clock, steady: Unix time, and monotonic time.
    """

    def __init__(
        self,
        cashier: Cashier,
        offering: Offering,
        under_way: UnderWay,
        clock: Callable[[], float] = time,
        steady: Callable[[], float] = monotonic,
    ) -> None:
        self._cashier, self._offering, self._under_way = cashier, offering, under_way
        self._clock, self._steady = clock, steady
        self._routes = lru_cache(1_000)(_route)

    async def offer(self, ask: wire.Ask) -> wire.Offered | wire.Refused:
        """Return the 402 of a request without a payment."""
        try:
            facts, route = self._facts(ask), self._route(ask)
            return _ready(wire.Offered, self._offering.structured(facts, route, self._clock()))
        except PaychanError as error:  # such as a Host header that no host can have
            return _ready(wire.Refused, refusal(error))

    async def charge(self, ask: wire.Ask) -> wire.Reply:
        """Charge a request to the channel of its payment, or return the answer for the payer.

        A request without a payment gets the 402. A request that another try is serving gets 409.
        """
        try:
            facts = self._facts(ask)
        except PaychanError as error:
            return _ready(wire.Refused, refusal(error))
        asked = _asked(ask)
        if not brings_payment(asked.fields):
            return await self.offer(ask)
        route = self._route(ask)
        offer = self._offering.offer(route, facts)
        outcome = await self._cashier.pay(asked, offer)
        if isinstance(outcome, Closed):
            return _closed(outcome)
        if isinstance(outcome, Refused):
            state = None if ends_channel(outcome.error) else outcome.state
            shown = self._offering.structured(facts, route, self._clock(), outcome.error, state)
            return _ready(wire.Refused, shown)
        return await self._begin(outcome, ask.visit)

    async def _begin(self, paid: Paid, visit: str) -> wire.Reply:
        charged, before = paid.charged, paid.before
        key = (charged.outpoint, charged.request)
        problem = self._under_way.begin(key, visit, charged.charged_sat, before, self._steady())
        if problem is None:
            return self._charged(charged, charged.outpoint, paid.paper.way, paid.paper.challenge_id)
        if before is not None or isinstance(problem, AlreadyDelivered):  # a record may forget a delivered request
            paid_before = before.charged_sat if before is not None else Sat(0)
            if charged.charged_sat > paid_before:
                await self._cashier.charges.release(*key, paid_before)
        answer = refusal(problem)
        headers = answer.headers
        if isinstance(problem, RequestUnderWay):
            headers = (*headers, ("Retry-After", _RETRY_AFTER_SECONDS))
        return _ready(wire.Refused, Answer(answer.status, headers, answer.body))

    async def release(self, ask: wire.Release) -> wire.Reply:
        """Lower a charge; for a repeated request not below what was delivered before.

        Raises:
            PaychanError: the channel or its charge is not known, or the disk can't be written.
        """
        key = _key(ask)
        to_sat = max(Sat(ask.to_sat), self._under_way.least_sat(key))
        result = await self._cashier.charges.release(*key, to_sat)
        if isinstance(result, PaychanError):
            raise result
        self._under_way.lowered(key, result.charged_sat, is_over=ask.to_sat == 0)
        return self._charged(result, key[0], ask.way, ask.challenge)

    async def done(self, ask: wire.Done) -> None:
        """Note that an answer has begun to leave: its charge is final."""
        key = _key(ask)
        self._under_way.done(key)
        self._cashier.charges.delivered(*key)

    def _charged(self, charged: Charged, channel: OutPoint, way: wire.Way, challenge: str) -> wire.Charged:
        """Write a charge under the channel's name by which the program knows it."""
        headers: wire.Headers = ()
        if way:
            now = UnixTime(int(self._clock()))
            headers = (outcome_header(way, challenge, charged, self._offering.terms.chain, now),)
        return wire.Charged(
            channel=str(channel),
            request=charged.request.hex(),
            charged_sat=charged.charged_sat,
            credit_sat=charged.channel.credit_sat,
            headers=headers,
            way=way,
            challenge=challenge,
        )

    def _facts(self, ask: wire.Ask) -> Facts:
        """Read the facts of a request. Raises `SignerUnavailable`: the identity key is not known yet; `Malformed`."""
        if not self._offering.terms.identity:
            raise SignerUnavailable(reason="the server has not learnt its identity key yet")
        return _facts(ask)

    def _route(self, ask: wire.Ask) -> Route:
        """Return the same route for the same price, by which `Offering` knows its prepared answers."""
        return self._routes(ask.price_sat, ask.is_ceiling, ask.unit, ask.realm, ask.description, ask.mime_type)


def _route(price_sat: int, is_ceiling: bool, unit: str, realm: str, description: str, mime_type: str) -> Route:
    return Route(
        path="",
        methods=(),
        unit=unit,
        amount_sat=Sat(price_sat),
        is_ceiling=is_ceiling,
        realm=realm,
        description=description,
        mime_type=mime_type,
        upstream="",
        timeouts=Timeouts(),
        pause_seconds=0.0,
        gives_back=frozenset(),
    )


def _facts(ask: wire.Ask) -> Facts:
    """Read what the 402 depends on. Raises `Malformed`."""
    scheme, separator, rest = ask.url.partition("://")
    if not separator or not ask.url.isprintable():
        raise Malformed(field="url", reason="want an absolute URL in printable characters")
    host, slash, target = rest.partition("/")
    first = {name.lower(): value for name, value in reversed(ask.headers)}
    return Facts(
        ask.method, host, slash + target or "/", scheme, first.get("accept", ""), first.get("accept-payment", "")
    )


def _asked(ask: wire.Ask) -> Asked:
    fields: dict[str, list[str]] = {}
    for name, value in ask.headers:
        fields.setdefault(name.lower(), []).append(value)
    digest = None if ask.body_sha256 is None else bytes.fromhex(ask.body_sha256)
    return Asked(ask.method, ask.url, lambda name: fields.get(name.lower(), []), digest)


def _key(ask: wire.Release | wire.Done) -> Key:
    txid, _, vout = ask.channel.partition(":")
    try:
        outpoint = OutPoint.parse(txid, int(vout))
    except (PaychanError, ValueError, OverflowError):
        raise Malformed(field="channel", reason="want txid:vout") from None
    return outpoint, bytes.fromhex(ask.request)


_Kind = TypeVar("_Kind", wire.Offered, wire.Refused)


def _ready(kind: type[_Kind], answer: Answer) -> _Kind:
    return kind(status=answer.status, headers=answer.headers, body=answer.body.decode())


def _closed(closed: Closed) -> wire.Closed:
    shown = {"channel": str(closed.channel.outpoint), "state": "closing", "credit_sat": closed.channel.credit_sat}
    headers = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
    return wire.Closed(status=200, headers=headers, body=msgspec.json.encode(shown).decode())


# --- HTTP -------------------------------------------------------------------------------------------------------------


class _Door(Struct, frozen=True):
    """Reads messages strictly, and answers errors by their codes."""

    merchant: Merchant
    token: str
    """"": the listener is a socket whose file's mode guards it."""

    def application(self) -> web.Application:
        found = web.Application(client_max_size=wire.MAX_BODY_BYTES, middlewares=[self._guarded])
        merchant = self.merchant
        found.router.add_post("/offer", partial(_answered, wire.Ask, merchant.offer))
        found.router.add_post("/charge", partial(_answered, wire.Ask, merchant.charge))
        found.router.add_post("/release", partial(_answered, wire.Release, merchant.release))
        found.router.add_post("/done", partial(_answered, wire.Done, merchant.done))
        return found

    @property
    def _guarded(self):  # type: ignore[no-untyped-def] # noqa: ANN202 - aiohttp's type of a middleware
        @web.middleware
        async def guarded(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            try:
                self._check(request)
                return await handler(request)
            except web.HTTPNotFound:
                return _failure(NoSuchRoute())
            except web.HTTPMethodNotAllowed:
                return _failure(MethodNotAllowed(method=request.method))
            except web.HTTPRequestEntityTooLarge:
                got = request.content_length or wire.MAX_BODY_BYTES + 1
                return _failure(BodyTooLarge(got_bytes=got, limit_bytes=wire.MAX_BODY_BYTES))
            except PaychanError as error:
                return _failure(error)
            except Exception:
                log.exception("a seller's program got no answer", path=request.path)
                return _failure(InternalError())

        return guarded

    def _check(self, request: web.Request) -> None:
        if self.token:
            got = request.headers.get("Authorization", "").encode("latin1", "replace")
            if not hmac.compare_digest(got, f"Bearer {self.token}".encode()):
                raise MerchantTokenWrong
        if request.method == "POST" and request.content_type != "application/json":
            raise Malformed(field="Content-Type", reason="want application/json")


async def _answered(
    kind: type[_Message], call: Callable[[_Message], Awaitable[wire.Reply | None]], request: web.Request
) -> web.Response:
    body = await request.read()
    try:
        message = msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Malformed(field="body", reason=str(error)[:200]) from None
    reply = await call(message)
    return web.Response(status=204) if reply is None else _json(200, reply)


def _failure(error: PaychanError) -> web.Response:
    return _json(error.http_status, wire.Failure(code=error.code, detail=str(error)))


def _json(status: int, reply: wire.Reply) -> web.Response:
    headers = {"Cache-Control": "no-store"}
    return web.Response(
        status=status, body=msgspec.json.encode(reply), content_type="application/json", headers=headers
    )


def merchant_application(merchant: Merchant, token: str = "", more: Sequence[AddRoutes] = ()) -> web.Application:
    """Return the interface as an application of aiohttp; with a token, each request must bring it."""
    found = _Door(merchant, token).application()
    for add in more:
        add(found.router)
    return found
