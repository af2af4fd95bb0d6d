"""The method `bitcoin`/`session` for the SDK's server: it charges through the merchant interface of a paychan server.

The SDK makes and checks its own challenges, for the terms that the merchant interface offers. A credential that it has checked is
shown to the merchant interface with a challenge of its own, for the same request and price: a payer's signature is over the
payment alone. A payer that is behind gets a challenge with the state of its channel.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from mpp import Challenge as SdkChallenge
from mpp import Receipt
from mpp.errors import InternalPaymentError, VerificationFailedError
from mpp.server.compose import ComposedHandler
from mpp.server.decorator import pay as sdk_pay
from mpp.server.http import Request as SdkRequest
from mpp.server.method import RequestContext, ServerMethod, VerifyContext
from mpp.server.mpp import Mpp
from msgspec import Struct

from paychan.client.amounts import satoshi
from paychan.mpp.method import SESSION
from paychan.protocol.errors import PaychanError
from paychan.protocol.wire import merchant as wire
from paychan.protocol.wire import mpp
from paychan.protocol.wire.canonical import from_base64url, json_object, to_base64url
from paychan.protocol.wire.challenge_header import FIELD
from paychan.protocol.wire.mpp_challenge import MAX_REQUEST_BYTES, SCHEME, Challenge, request_of
from paychan.protocol.wire.mpp_outcomes import MAX_RECEIPT_BYTES, RECEIPT_HEADER
from paychan.sell.exchange import Exchange, Rules, Send
from paychan.sell.link import AsyncLink, Place
from paychan.sell.requests import Price, Request

OFFER_SECONDS = 60.0
"""Time for which the merchant interface's challenge of a price is used again; it holds for 300 s."""

_FOREIGN = "https://mpp.invalid/"
"""Base for URLs that are none of HTTP, such as those of tools: the merchant interface takes HTTP."""
_STATE = ("channelId", "sessionSnapshot")
_RECEIPT_BASE = ("status", "method", "timestamp", "reference")

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Awaitable[Any]])


class _Sale(Struct, frozen=True):
    """The request that is being sold; it goes from `resolve_request` to `verify` beside the wire request."""

    request: Request
    headers: wire.Headers
    body_sha256: str | None
    price: Price
    challenge: Challenge
    """Of the merchant interface."""


class Refusal(VerificationFailedError):
    """A payment that was not charged. The problem is that of the merchant interface.

    The SDK answers with the challenge that it puts into `retry_challenge`; a payer that is behind gets it with its state.
    """

    def __init__(self, problem: Mapping[str, Any], correct: Callable[[SdkChallenge], SdkChallenge]) -> None:
        super().__init__(str(problem.get("detail", "")))
        self._problem, self._correct = problem, correct
        self._shown: SdkChallenge | None = None

    @property
    def retry_challenge(self) -> SdkChallenge | None:
        return self._shown

    @retry_challenge.setter
    def retry_challenge(self, challenge: Any) -> None:
        self._shown = self._correct(challenge)

    def to_problem_details(self, challenge_id: str | None = None) -> dict[str, Any]:
        """Return the problem with the id of the new challenge."""
        return {**self._problem, "status": 402, "challengeId": challenge_id}


class ChannelSales:
    """Sells through a server of the SDK: `method` is for `Mpp`, `pay` for endpoints.

    Args:
        merchant, token_file: where the server's merchant interface is; see `paychan.sell.link.Place`.
        realm, secret_key: those of the SDK's `Mpp`.
    """

    def __init__(
        self,
        merchant: str | os.PathLike[str] | None = None,
        *,
        token_file: str | os.PathLike[str] | None = None,
        realm: str,
        secret_key: str,
    ) -> None:
        self.link = AsyncLink(Place(merchant, token_file))
        self._realm, self._secret_key = realm, secret_key
        self._tasks: set[asyncio.Task[object]] = set()
        self._offers: dict[Price, tuple[float, Challenge]] = {}
        self._sold: ContextVar[Exchange | None] = ContextVar("sold", default=None)
        self._waits: ContextVar[bool] = ContextVar("waits", default=False)
        self.method = ServerMethod(method=SESSION, resolve_request=self._resolve, verify=self._verify)

    def engine(self, **options: Any) -> Mpp:
        """Return the SDK's `Mpp` with this method alone."""
        return Mpp(self.method, realm=self._realm, secret_key=self._secret_key, **options)

    def pay(self, route: ComposedHandler) -> Callable[[_Endpoint], _Endpoint]:
        """Do what the SDK's `pay` does, and give the price back if the endpoint fails or answers with 500 or above.

        Without it, such as with the SDK's own `pay`, a charge is final before the endpoint runs.
        """

        def decorate(endpoint: _Endpoint) -> _Endpoint:
            @wraps(endpoint)
            async def delivering(*args: Any, **kwargs: Any) -> Any:
                exchange = self._sold.get()
                try:
                    response = await endpoint(*args, **kwargs)
                except BaseException:
                    await self._end(exchange, gives_back=True)
                    raise
                fails = getattr(response, "status_code", 200) >= 500
                await self._end(exchange, gives_back=fails)
                if fails and exchange is not None and exchange.charged is not None:
                    newest = _receipt(exchange.charged, args[-1].extensions["challengeId"])
                    response.headers[RECEIPT_HEADER] = (
                        newest.to_payment_receipt()
                    )  # the SDK keeps a header that the response has
                return response

            paid = sdk_pay(route)(delivering)

            @wraps(paid)
            async def serving(*args: Any, **kwargs: Any) -> Any:
                waits, sold = self._waits.set(True), self._sold.set(None)
                try:
                    return await paid(*args, **kwargs)
                finally:
                    self._waits.reset(waits)
                    self._sold.reset(sold)

            serving.__signature__ = paid.__signature__  # type: ignore[attr-defined] # frameworks read it
            return serving  # type: ignore[return-value] # the framework's signature, as the SDK's `pay`

        return decorate

    async def close(self) -> None:
        """Close the connections to the paychan server, after the messages under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.link.close()

    async def _end(self, exchange: Exchange | None, *, gives_back: bool) -> None:
        if exchange is not None:
            work = exchange.give_back() if gives_back else exchange.delivered()
            await asyncio.shield(self._keep(self.link.drive(work)))

    def _keep(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Send messages to the end. Await the task by `shield`: the request may be cancelled meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _undo(self, exchange: Exchange, paying: asyncio.Task[object]) -> None:
        await asyncio.wait([paying])
        await self.link.drive(exchange.give_back())

    async def _resolve(self, context: RequestContext) -> dict[str, Any]:
        """Return the wire request of a price, with the terms of the paychan server."""
        asked = dict(context.request)
        price = Price(satoshi(int(asked["amount"]), "amount"), unit=asked.get("unitType", "request"), realm=self._realm)
        offered = await self._offered(price)
        request = request_of(offered)
        echoed = _echoed(context)
        details = echoed.get("methodDetails")
        if isinstance(details, dict) and "sessionSnapshot" in details:  # the SDK checks that this server signed it
            request["methodDetails"] |= {name: details[name] for name in _STATE if name in details}
        return {**request, "_sale": _sale(context.input, price, offered)}

    async def _offered(self, price: Price) -> Challenge:
        """Return a challenge of the merchant interface. Raises `ServerAway`, or `InternalPaymentError` without an offer."""
        known, now = self._offers.get(price), time.monotonic()
        if known is not None and now < known[0] + OFFER_SECONDS:
            return known[1]
        ask = wire.Ask(method="GET", url=_FOREIGN, price_sat=price.sat, unit=price.unit, realm=price.realm)
        reply = await self.link.send(Send("/offer", ask))
        found = _challenges(reply.headers) if isinstance(reply, wire.Offered) else []
        if not found:
            raise InternalPaymentError
        self._offers[price] = (now, found[0].challenge)
        return found[0].challenge

    async def _verify(self, context: VerifyContext) -> Receipt:
        """Charge a credential that the SDK has checked.

        Raises:
            Refusal: the payment or its credit does not suffice; nothing changed.
            InternalPaymentError: the paychan server is away.
        """
        sale: _Sale = context.request["_sale"]
        payload: Any = context.credential.payload  # a SessionPayload, by the SDK's own word
        shown = {"challenge": sale.challenge, "payload": payload.model_dump(mode="json", by_alias=True)}
        header = ("authorization", f"{SCHEME} {to_base64url(msgspec.json.encode(shown))}")
        exchange = Exchange(
            Rules(lambda status: status >= 500, free_when_away=False), sale.request, (header, *sale.headers)
        )
        paying = self._keep(self.link.drive(exchange.pay(sale.price, sale.body_sha256)))
        try:
            await asyncio.shield(paying)
        except asyncio.CancelledError:  # the payer is gone: a charge that comes yet is given back
            self._keep(self._undo(exchange, paying))
            raise
        if exchange.charged is None:
            assert exchange.answer is not None
            raise self._refusal(exchange.answer)
        if self._waits.get():
            self._sold.set(exchange)
        else:
            await self._end(exchange, gives_back=False)
        return _receipt(exchange.charged, context.challenge.id)

    def _refusal(self, ready: wire.Ready) -> Exception:
        if ready.status >= 500 or ready.status < 400:
            return InternalPaymentError()
        states = [each.challenge for each in _challenges(ready.headers) if each.state is not None]

        def correct(challenge: SdkChallenge) -> SdkChallenge:
            if not states:
                return challenge
            details = request_of(states[0])["methodDetails"]
            own = {**challenge.request["methodDetails"], **{name: details[name] for name in _STATE}}
            return SdkChallenge.create(
                secret_key=self._secret_key,
                realm=challenge.realm,
                method=challenge.method,
                intent=challenge.intent,
                request={**challenge.request, "methodDetails": own},
                expires=challenge.expires,
                digest=challenge.digest,
                description=challenge.description,
                meta=challenge.opaque,
                header=challenge.header,
            )

        return Refusal(json.loads(ready.body), correct)


def _challenges(headers: wire.Headers) -> list[mpp.Found]:
    return mpp.offers(value for name, value in headers if name.lower() == FIELD.lower())


def _echoed(context: RequestContext) -> dict[str, Any]:
    """Return the request of the challenge that a credential answers; nothing if it can't be read."""
    if context.credential is None:
        return {}
    try:
        return json_object(
            from_base64url(context.credential.challenge.request, "request", MAX_REQUEST_BYTES), "request"
        )
    except PaychanError:
        return {}


def _sale(asked: SdkRequest | None, price: Price, challenge: Challenge) -> _Sale:
    """Return what is sold. A body that the SDK has not read makes a request that is never taken for a repetition."""
    if asked is None:
        return _Sale(Request("POST", _FOREIGN, {}), (), None, price, challenge)
    url = asked.url if asked.url.startswith(("http://", "https://")) else _FOREIGN + quote(asked.url)
    is_known = asked.body is not None or asked.method in ("GET", "HEAD")
    digest = hashlib.sha256(asked.body or b"").hexdigest() if is_known else None
    key = asked.headers.get("idempotency-key")
    headers = () if key is None else (("idempotency-key", key),)
    return _Sale(Request(asked.method, url, {}), headers, digest, price, challenge)


def _receipt(charged: wire.Charged, challenge_id: str) -> Receipt:
    """Return the merchant interface's receipt as the SDK's, for the SDK's own challenge."""
    value = next(value for name, value in charged.headers if name.lower() == RECEIPT_HEADER.lower())
    shown = json_object(from_base64url(value, RECEIPT_HEADER, MAX_RECEIPT_BYTES), RECEIPT_HEADER)
    return Receipt(
        status="success",
        timestamp=datetime.fromisoformat(shown["timestamp"]),
        reference=shown["reference"],
        method=shown["method"],
        extensions={
            **{name: value for name, value in shown.items() if name not in _RECEIPT_BASE},
            "challengeId": challenge_id,
        },
    )
