"""x402's facilitator for sellers on other stacks: `/supported`, `/verify`, `/settle`, on the merchant interface's listener.

`/settle` books payment and price in one durable step, so sellers settle before they work (flow `upfront`). A payment that is
settled again, because the answer to the seller was lost, costs nothing more, and is a success a few times only: a payer
that repeats its payment must not be served without end for one price. `/verify` changes nothing. Refusals have status 200,
as the SDKs want it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from paychan.gateway.cashier import Asked, Cashier, Paid, Paper, Refusal, request_id
from paychan.gateway.charging import Charged, shown_state
from paychan.gateway.offering import Offering
from paychan.gateway.underway import Key
from paychan.protocol import credit
from paychan.protocol.channel import Rejected, View
from paychan.protocol.charges import Charge, Delivery
from paychan.protocol.errors import Malformed, PaychanError, SignerUnavailable, UnknownChannel
from paychan.protocol.request_id import NO_BODY
from paychan.protocol.types import OutPoint
from paychan.protocol.unpaid import AlreadyDelivered, OfferMismatch, PaymentUnsupported, RequestUnderWay
from paychan.protocol.wire import x402
from paychan.protocol.wire.offers import Offer, Settled, Voucher
from paychan.protocol.wire.x402_json import (
    SIGNATURE_HEADER,
    PaymentPayload,
    SettleResponse,
    SupportedKind,
    SupportedResponse,
    VerifyResponse,
    encode_header,
    payment_of,
    requirements_of,
)
from paychan.protocol.wire.x402_outcomes import refused_json, settled_json, verified_json

_MOST_KEPT = 50_000
"""Settled requests that are remembered; the oldest are forgotten first. Then the channel's record alone knows them."""


class _Settlement(Struct):
    """A request that was settled: when it was last, and how often."""

    at: float
    times: int = 1


class _Request(Struct, frozen=True):
    """A payment, the offer that it answers, and its request."""

    payload: PaymentPayload
    voucher: Voucher
    offer: Offer
    asked: Asked

    @property
    def name(self) -> bytes:
        """The id of the request, as the cashier makes it."""
        return request_id(self.asked, Paper("x402", self.voucher, x402.identifier_of(self.payload)))


class Facilitator:
    """Verifies and settles payments for sellers' programs; free of HTTP.

    Args:
        cashier: charges payments.
        offering: the terms of this server.
        view: the facts by which a channel's payments are judged now.
        lease_seconds: a request is not settled again before this time has passed: it may still be served.
        repeats: how often a request is settled again without a charge.
        steady: monotonic time.
    """

    def __init__(
        self,
        cashier: Cashier,
        offering: Offering,
        view: Callable[[OutPoint], View],
        *,
        lease_seconds: float,
        repeats: int,
        steady: Callable[[], float] = monotonic,
    ) -> None:
        self._cashier, self._offering, self._view = cashier, offering, view
        self._lease_seconds, self._repeats, self._steady = lease_seconds, repeats, steady
        self._settled: OrderedDict[Key, _Settlement] = OrderedDict()

    def supported(self) -> SupportedResponse:
        """Name the one kind that this server settles, with the terms of a new channel.

        Raises:
            SignerUnavailable: the signer has not reported the identity key yet.
        """
        terms = self._offering.terms
        if not terms.identity:
            raise SignerUnavailable(reason="it has not reported the identity key yet")
        kind = SupportedKind(
            x402_version=2, scheme=x402.SCHEME, network=terms.chain, extra=x402.requirements(terms).extra
        )
        return SupportedResponse([kind], [x402.IDENTIFIER], {"bip122:*": [terms.identity.hex()]})

    async def verify(self, body: Any) -> VerifyResponse:
        """Judge a payment as `settle` would, and change nothing."""
        try:
            request = self._read(body)
            outpoint = request.voucher.channel
            channel = await self._cashier.charges.find(outpoint)
            if channel is None:
                raise UnknownChannel
            wrong = request.voucher.mismatch(channel.funding_sat)
            if wrong is not None:
                raise wrong
            command = Charge(bytes(16), request.offer.amount_sat, request.voucher.payment)
            judged = credit.charge(channel, command, self._view(outpoint))
        except PaychanError as error:
            return verified_json(error)
        error_found = judged.error if isinstance(judged, Rejected) else None
        return verified_json(error_found, channel.terms.client_key)

    async def settle(self, body: Any) -> SettleResponse:
        """Charge a payment with the amount of its requirements. A refusal charges nothing."""
        chain = self._offering.terms.chain
        try:
            request = self._read(body)
            outcome = await self._cashier.pay(request.asked, request.offer)
        except PaychanError as error:
            return refused_json(error, chain)
        if isinstance(outcome, Refusal):
            return refused_json(outcome.error, chain, outcome.state)
        assert isinstance(outcome, Paid)  # `_read` lets payments through alone
        problem = self._begin(outcome.charged, outcome.before)
        if problem is not None:
            return refused_json(problem, chain)
        charged = outcome.charged
        self._cashier.charges.delivered(charged.outpoint, charged.request)
        state = shown_state(charged.channel, proof=False)
        return settled_json(Settled(state, charged.charged_sat, charged.channel.terms.client_key), chain)

    async def unsettle(self, body: Any) -> SettleResponse:
        """Give a price back as credit: the seller's handler failed. A request that was settled twice keeps its charge."""
        chain = self._offering.terms.chain
        try:
            request = self._read(body)
            key = (request.voucher.channel, request.name)
            known = self._settled.get(key)
            if known is None or known.times != 1:
                raise AlreadyDelivered(got=known.times if known else 0, limit=1)
            released = await self._cashier.charges.release(*key)
            if isinstance(released, PaychanError):
                raise released
        except PaychanError as error:
            return refused_json(error, chain)
        del self._settled[key]
        state = shown_state(released.channel, proof=False)
        return settled_json(Settled(state, released.charged_sat, released.channel.terms.client_key), chain)

    def _begin(self, charged: Charged, before: Delivery | None) -> PaychanError | None:
        """Return why a charged request is no success again, or note that it is one."""
        key, now = (charged.outpoint, charged.request), self._steady()
        known = self._settled.get(key)
        if known is None:
            self._settled[key] = _Settlement(now, 1 if before is None else 2)
            while len(self._settled) > _MOST_KEPT:
                self._settled.popitem(last=False)
            return None
        if known.times > self._repeats:
            return AlreadyDelivered(got=known.times, limit=self._repeats + 1)
        if now < known.at + self._lease_seconds:
            return RequestUnderWay(wait_seconds=max(1, round(known.at + self._lease_seconds - now)))
        known.at, known.times = now, known.times + 1
        self._settled.move_to_end(key)
        return None

    def _read(self, body: Any) -> _Request:
        """Read a request of the SDKs. Raises a `PaychanError`: it has another form, or pays another server."""
        if not isinstance(body, dict):
            raise Malformed(field="body", reason="want an object with paymentPayload and paymentRequirements")
        payload = payment_of(body.get("paymentPayload"))
        offer = x402.offer_of(requirements_of(body.get("paymentRequirements")))
        terms = self._offering.terms
        for name, got, want in (
            ("pay_to", offer.identity.hex(), terms.identity.hex()),
            ("network", offer.chain, terms.chain),
        ):
            if got != want:
                raise OfferMismatch(field=name, got=got, want=want)
        if (other := x402.mismatch(payload.accepted, offer)) is not None:
            raise other
        action = x402.action_of(payload.payload)
        if not isinstance(action, Voucher):  # a success would make the seller serve the request
            raise PaymentUnsupported(field="type", got=str(payload.payload.get("type")), want="payment")
        url = payload.resource.url if payload.resource is not None else ""
        header = encode_header(payload)
        asked = Asked("", url, lambda name: [header] if name == SIGNATURE_HEADER else [], NO_BODY)
        return _Request(payload, action, offer, asked)


def add_routes(router: web.UrlDispatcher, facilitator: Facilitator) -> None:
    """Add the facilitator's routes to the merchant interface, whose guard checks the token and answers errors."""

    async def supported(_request: web.Request) -> web.Response:
        return _json(facilitator.supported())

    async def verify(request: web.Request) -> web.Response:
        return _json(await facilitator.verify(await _body(request)))

    async def settle(request: web.Request) -> web.Response:
        return _json(await facilitator.settle(await _body(request)))

    async def unsettle(request: web.Request) -> web.Response:
        return _json(await facilitator.unsettle(await _body(request)))

    router.add_get("/supported", supported)
    router.add_post("/verify", verify)
    router.add_post("/settle", settle)
    router.add_post("/unsettle", unsettle)


async def _body(request: web.Request) -> Any:
    try:
        return msgspec.json.decode(await request.read())
    except (msgspec.DecodeError, RecursionError):
        raise Malformed(field="body", reason="not JSON") from None


def _json(reply: Struct) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(reply), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
