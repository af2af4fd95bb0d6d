"""The reverse proxy: a request is charged and forwarded, and its answer streamed to the payer.

    path ──price list──▶ free: forward
                     └─▶ priced: no payment ──▶ 402 with an offer
                                 payment ──cashier──▶ refused: 402 with the reason and the channel's state
                                                  └─▶ charged ──▶ forward ──▶ answer, with the sum that was charged
                                                                     └─▶ no answer, or a status of `gives_back`: credit

The charge is on disk before the upstream sees the request. A price that was not earned is given back on disk before the
payer learns of it. Bodies pass in chunks in both directions: memory does not depend on their size.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from hashlib import sha256
from time import monotonic

import aiohttp
import structlog
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from paychan.gateway.answers import Stored
from paychan.gateway.asking import Facts
from paychan.gateway.bodies import chunks_of_answer, chunks_to_upstream, small_body
from paychan.gateway.cashier import Asked, Closed, Refusal, brings_payment, ends_channel
from paychan.gateway.discovery import HEADERS as CATALOGUE_HEADERS
from paychan.gateway.discovery import TYPES
from paychan.gateway.forwarding import to_payer, to_upstream
from paychan.gateway.front import connection_of
from paychan.gateway.metering import Meter, MeteredBody, MeterEnded
from paychan.gateway.offering import CORS, PREFLIGHT, Answer
from paychan.gateway.prices import Route
from paychan.gateway.sale import Sale, Shop, refused
from paychan.gateway.tunnel import is_upgrade, tunnel
from paychan.protocol.errors import Malformed, MethodNotAllowed, PaychanError, SignerUnavailable
from paychan.protocol.request_id import NO_BODY
from paychan.protocol.saidprice import OVERRIDES_HEADER, PRICE_HEADER, said_price
from paychan.protocol.types import Sat
from paychan.protocol.unpaid import AlreadyDelivered

log = structlog.get_logger("gateway")

_FOR_PROXIES = frozenset({"CONNECT", "TRACE"})
"""Methods that are about the way to a server, or show what passed there: none has an answer to sell."""

_SMALL_ANSWER_BYTES = 32_768
"""An answer's body up to this size leaves with its head: asyncio buffers 64 kB before a write has to wait."""


class _NoAnswer(aiohttp.ClientError):
    """The upstream changes the protocol without being asked."""


class Proxy:
    """Handles the requests of a gateway that its front did not answer."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop

    def quick(self, method: str, target: str, fields: dict[bytes, bytes], now: float) -> bytes | None:
        """Answer a plain request without a payment for a priced route; see `front`."""
        shop = self.shop
        path = target.partition("?")[0]
        if shop.allowance.exists or path in TYPES:
            return None
        try:
            route = shop.prices.find(method, path)
            if route.is_free or not shop.offering.terms.identity:
                return None
            facts = Facts(
                method,
                fields[b"host"].decode(),
                target,
                accept=fields.get(b"accept", b"").decode(),
                accept_payment=fields.get(b"accept-payment", b"").decode(),
            )
        except (PaychanError, KeyError):
            return None
        return shop.offering.answer(facts, route, now)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        shop = self.shop
        try:
            facts = self._facts(request)
            path = facts.target.partition("?")[0]
            catalogue = shop.catalogues.at(path, f"{facts.scheme}://{facts.host}")
            if catalogue is not None and request.method in ("GET", "HEAD"):
                return _catalogue(path, catalogue)
            route = self._route(request, path)
        except PaychanError as error:
            return refused(request, error)
        if not route.is_free and not shop.offering.terms.identity:
            return refused(request, SignerUnavailable(reason="the gateway does not know its identity key yet"))
        if not route.is_free and _is_preflight(request):
            return web.Response(status=204, headers=CIMultiDict(PREFLIGHT))
        if route.is_free:
            return await self._forward(Sale(shop, request, facts, route, None))
        return await self._sell(request, facts, route)

    def _facts(self, request: web.BaseRequest) -> Facts:
        _, scheme, host = self.shop.client_of(request)
        target = request.raw_path
        if request.method in _FOR_PROXIES:
            raise MethodNotAllowed(method=request.method)
        if not target.startswith("/"):
            raise Malformed(field="target", reason="want a path that begins with /")
        if len(request.headers.getall("Host", ())) != 1:
            raise Malformed(field="host", reason="want one Host header")
        codings = request.headers.getall("Transfer-Encoding", ())
        if codings and [coding.lower() for coding in codings] != ["chunked"]:
            raise Malformed(field="transfer-encoding", reason="want chunked alone")
        headers = request.headers
        return Facts(request.method, host, target, scheme, headers.get("Accept", ""), headers.get("Accept-Payment", ""))

    def _route(self, request: web.BaseRequest, path: str) -> Route:
        """Find the route; a preflight is about the method that it announces."""
        method = request.method
        if _is_preflight(request):
            with contextlib.suppress(MethodNotAllowed):
                return self.shop.prices.find(method, path)
            method = request.headers["Access-Control-Request-Method"]
        return self.shop.prices.find(method, path)

    # --- selling -----------------------------------------------------------------------------------------------------

    async def _sell(self, request: web.BaseRequest, facts: Facts, route: Route) -> web.StreamResponse:
        shop = self.shop

        def fields(name: str) -> list[str]:
            return request.headers.getall(name, [])

        if not brings_payment(fields):
            address = shop.client_of(request)[0]
            if shop.allowance.takes(address, monotonic()):
                return await self._forward(Sale(shop, request, facts, route, None))
            return _answer(shop.offering.structured(facts, route, shop.clock()), request)
        connection = connection_of(request)
        problem = connection.penalty.problem()
        if problem is not None:
            return _last(refused(request, problem))
        try:
            body = await small_body(request, route.timeouts.idle_seconds)
        except Malformed as error:
            return refused(request, error)
        digest = NO_BODY if body == b"" else None if body is None else sha256(body).digest()
        offer = shop.offering.offer(route, facts)
        is_voucher = route.is_metered and request.method == "HEAD"
        asked = Asked(request.method, facts.url, fields, digest)
        paid = await shop.cashier.pay(asked, offer, Sat(0) if is_voucher else None)
        if isinstance(paid, Refusal):
            await connection.penalise(paid.error)
            state = None if ends_channel(paid.error) else paid.state
            return _answer(shop.offering.structured(facts, route, shop.clock(), paid.error, state), request)
        if isinstance(paid, Closed):
            return web.Response(status=204, headers=CIMultiDict([*CORS, ("Cache-Control", "no-store")]))
        connection.paid = True
        sale = Sale(shop, request, facts, route, body, paid, paid.charged)
        if is_voucher:
            return web.Response(status=204, headers=sale.success(CIMultiDict()))
        return await self._once(sale)

    async def _once(self, sale: Sale) -> web.StreamResponse:
        """Forward a charged request; answer a repetition from the stored answer, or forward it a few times more."""
        key, paid = sale.key, sale.paid
        if key is None or paid is None:
            raise TypeError(key)
        stored = self.shop.answers.find(key)
        if stored is not None:
            # of a route with a ceiling, and of a request that the record forgot, the repetition was charged again
            await sale.give_back(paid.before.charged_sat if paid.before is not None else Sat(0))
            connection = connection_of(sale.request)
            await connection.delay(connection.penalty.no_value())
            headers = sale.success(CIMultiDict(stored.headers))
            headers["Content-Length"] = str(len(stored.body))
            return web.Response(status=stored.status, reason=stored.reason, headers=headers, body=stored.body)
        problem = self.shop.under_way.begin(key, "", paid.charged.charged_sat, paid.before, monotonic())
        if problem is not None:
            if isinstance(problem, AlreadyDelivered):  # also of a request that the record forgot
                await sale.give_back(paid.before.charged_sat if paid.before is not None else Sat(0))
            return refused(sale.request, problem)
        try:
            return await self._forward(sale)
        except BaseException:
            sale.give_back_later()
            raise

    # --- forwarding --------------------------------------------------------------------------------------------------

    async def _forward(self, sale: Sale) -> web.StreamResponse:
        request = sale.request
        if is_upgrade(request):
            return await tunnel(sale)
        try:
            async with asyncio.timeout(None) as deadline, self._ask(sale, deadline) as answer:
                deadline.reschedule(None)
                if answer.status < 200:
                    raise _NoAnswer(answer.status)
                return await self._pass_on(sale, answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if sale.has_begun:
                raise
            return await sale.fail(error)

    def _ask(self, sale: Sale, deadline: asyncio.Timeout) -> aiohttp.client._RequestContextManager:
        """Send the request; `deadline` is when the head of the answer must be there."""
        request, route, limits = sale.request, sale.route, sale.route.timeouts
        headers = to_upstream(request.headers, sale.charged)
        sale.tell_origin(headers)
        body: bytes | AsyncIterator[bytes] | None = sale.body
        headers.popall("Content-Length", None)
        if body is None and request.body_exists:
            body = chunks_to_upstream(request, limits, deadline)
            if request.content_length is not None:
                headers["Content-Length"] = str(request.content_length)
        deadline.reschedule(asyncio.get_running_loop().time() + limits.connect_seconds + limits.first_byte_seconds)
        return self.shop.upstream.request(
            request.method,
            URL(route.upstream + sale.facts.target, encoded=True),
            headers=headers,
            data=body or None,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=limits.connect_seconds),
        )

    async def _pass_on(self, sale: Sale, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """Charge by what the upstream said, then stream its answer."""
        if sale.charged is not None:
            await self._charge_by_answer(sale, answer)
        headers = to_payer(answer.headers)
        fields = tuple(headers.items())
        metered = self._metered(sale, answer)
        if metered is not None:
            headers.popall("Content-Length", None)
        headers, whole = sale.success(headers), None if metered else _whole(answer, sale.request)
        if whole is None:
            response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        else:
            response = web.Response(status=answer.status, reason=answer.reason, headers=headers, body=whole)
        if sale.request.transport is None:
            await sale.give_back()
        elif whole is None:
            await self._send(sale, answer, response, fields, metered)
        else:
            await self._send_whole(sale, answer, response, fields, whole)
        return response

    def _metered(self, sale: Sale, answer: aiohttp.ClientResponse) -> MeteredBody | None:
        route, paid, charged = sale.route, sale.paid, sale.charged
        if not route.is_metered or paid is None or charged is None or not charged.charged_sat:
            return None
        return MeteredBody(Meter(route, paid, charged, self.shop.cashier), route, answer.content_type, sale.request)

    async def _charge_by_answer(self, sale: Sale, answer: aiohttp.ClientResponse) -> None:
        route = sale.route
        if answer.status in route.gives_back:
            await sale.give_back()
        elif route.is_ceiling:
            said = said_price(answer.headers.get(PRICE_HEADER), answer.headers.get(OVERRIDES_HEADER), route.amount_sat)
            if said.trouble:
                log.warning("price not understood", route=route.name, reason=said.trouble)
            await sale.give_back(said.amount_sat)

    async def _send(
        self,
        sale: Sale,
        answer: aiohttp.ClientResponse,
        response: web.StreamResponse,
        fields: tuple[tuple[str, str], ...],
        metered: MeteredBody | None,
    ) -> None:
        """Stream the body. A payer that leaves before the first byte gets the price back; later the charge is final."""
        idle, kept, size = sale.route.timeouts.idle_seconds, list[bytes](), 0
        storable = metered is None and _is_storable(sale, answer)
        try:
            await response.prepare(sale.request)
            sale.begin()
            chunks = chunks_of_answer(answer, idle)
            chunks = metered.pieces(chunks) if metered else chunks
            async for chunk in chunks:
                size += len(chunk)
                storable = storable and size <= self.shop.answers.largest_bytes
                if storable:
                    kept.append(chunk)
                async with asyncio.timeout(idle):
                    await response.write(chunk)
        except MeterEnded:
            pass  # the credit ended and no payment came: the end of the body says where
        except (aiohttp.ClientError, TimeoutError, OSError):
            if not sale.has_begun:
                await sale.give_back()
            _cut(sale.request)
            return
        if storable and sale.key is not None:
            self.shop.answers.keep(sale.key, Stored(answer.status, answer.reason or "", fields, b"".join(kept)))
        with contextlib.suppress(ConnectionError):
            await response.write_eof()

    async def _send_whole(
        self,
        sale: Sale,
        answer: aiohttp.ClientResponse,
        response: web.StreamResponse,
        fields: tuple[tuple[str, str], ...],
        body: bytes,
    ) -> None:
        """Send head and body by one write, as `_send` does by several."""
        with contextlib.suppress(ConnectionError):
            await response.prepare(sale.request)
            sale.begin()
            if sale.key is not None and len(body) <= self.shop.answers.largest_bytes and _is_storable(sale, answer):
                self.shop.answers.keep(sale.key, Stored(answer.status, answer.reason or "", fields, body))
            await response.write_eof()
        if not sale.has_begun:
            await sale.give_back()


# --- answers of the gateway itself ------------------------------------------------------------------------------------


def _answer(answer: Answer, request: web.BaseRequest) -> web.Response:
    response = web.Response(status=answer.status, headers=CIMultiDict(answer.headers), body=answer.body)
    if request.body_exists:
        _last(response)  # its body is not read
    return response


def _last(response: web.Response) -> web.Response:
    response.force_close()
    return response


def _catalogue(path: str, content: bytes) -> web.Response:
    kind = {"Content-Type": TYPES[path]}
    return web.Response(body=content, headers=CIMultiDict([*CATALOGUE_HEADERS, *kind.items()]))


def _is_preflight(request: web.BaseRequest) -> bool:
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def _is_storable(sale: Sale, answer: aiohttp.ClientResponse) -> bool:
    """Say whether a repetition of the request may get this answer: it is a paid one."""
    return sale.charged is not None and answer.status not in sale.route.gives_back


def _cut(request: web.BaseRequest) -> None:
    """End the connection in the middle of a body, so that the payer does not take it for the whole."""
    if request.transport is not None:
        request.transport.abort()


def _whole(answer: aiohttp.ClientResponse, request: web.BaseRequest) -> bytes | None:
    """Return a small body that has arrived as a whole, if the payer's connection takes it without waiting."""
    content, transport = answer.content, request.transport
    if not content.is_eof() or content.exception() is not None or content.total_bytes > _SMALL_ANSWER_BYTES:
        return None
    if transport is None or transport.get_write_buffer_size() or request.method == "HEAD":
        return None
    return content.read_nowait() or None
