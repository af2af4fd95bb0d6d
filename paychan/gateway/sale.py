"""A request on its way through the gateway: its route, its charge, and what may still be given back."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import aiohttp
import structlog
from aiohttp import web
from multidict import CIMultiDict

from paychan.api.rate_limited_log import RateLimitedLog
from paychan.gateway.allowance import Allowance
from paychan.gateway.answers import Key, StoredAnswers
from paychan.gateway.asking import Facts
from paychan.gateway.cashier import Cashier, Paid
from paychan.gateway.charging import Charged
from paychan.gateway.discovery import Catalogues
from paychan.gateway.forwarding import private
from paychan.gateway.offering import CORS, Offering
from paychan.gateway.prices import PriceList, Route
from paychan.gateway.receipt_key import ReceiptKey
from paychan.gateway.underway import UnderWay
from paychan.protocol import receipts
from paychan.protocol.errors import Malformed, PaychanError
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.unpaid import RequestUnderWay, UpstreamFailed

WANT_RECEIPT_HEADER = "X-Paychan-Want-Receipt"
"""Field of a request, with any value: the payer wants a signed receipt."""

SIGNED_RECEIPT_HEADER = "X-Paychan-Receipt"
"""Field of the answer: the signed receipt (`protocol.receipts`) in standard base64."""

log = structlog.get_logger("gateway")


@dataclass(frozen=True)
class Shop:
    """The parts of a gateway that its requests use."""

    prices: PriceList
    offering: Offering
    cashier: Cashier
    catalogues: Catalogues
    answers: StoredAnswers
    allowance: Allowance
    upstream: aiohttp.ClientSession
    client_of: Callable[[web.BaseRequest], tuple[str, str, str]]
    """Returns the payer's address, scheme and host, by the connection or a trusted proxy's word."""
    clock: Callable[[], float]
    failing: RateLimitedLog
    receipts: ReceiptKey
    under_way: UnderWay


@dataclass
class Sale:
    """One request. `charged` is its newest charge; None on a free path."""

    shop: Shop
    request: web.BaseRequest
    facts: Facts
    route: Route
    body: bytes | None
    """The whole body if it is small; None: it passes in chunks."""
    paid: Paid | None = None
    charged: Charged | None = None
    has_begun: bool = False
    """Whether the answer has begun to leave: the charge is final."""

    @property
    def key(self) -> Key | None:
        return None if self.charged is None else (self.charged.outpoint, self.charged.request)

    def success(self, headers: CIMultiDict[str]) -> CIMultiDict[str]:
        """Add to the headers of the answer what the request was charged."""
        if self.paid is not None and self.charged is not None:
            offer = self.shop.offering.offer(self.route, self.facts)
            name, value = self.shop.cashier.success_header(self.paid, self.charged, offer)
            headers[name] = value
            self._add_receipt(headers)
            private(headers)
            for cors_name, cors_value in CORS:
                headers.setdefault(cors_name, cors_value)
        return headers

    def _add_receipt(self, headers: CIMultiDict[str]) -> None:
        """Add a signed receipt if the payer asked for one, and a key for receipts is certified."""
        charged = self.charged
        if charged is None or WANT_RECEIPT_HEADER not in self.request.headers:
            return
        raw = self.shop.receipts.sign(
            receipts.Paid(
                channel=charged.outpoint,
                change_sat=charged.channel.payment.change_sat,
                charged_sat=charged.charged_sat,
                credit_sat=charged.channel.credit_sat,
                method=self.facts.method,
                url=self.facts.url,
                time=UnixTime(int(self.shop.clock())),
                request_sha256=None if self.body is None else sha256(self.body).digest(),
            )
        )
        if raw is not None:
            headers[SIGNED_RECEIPT_HEADER] = b64encode(raw).decode()

    def begin(self) -> None:
        """Note that the answer begins to leave."""
        self.has_begun = True
        if self.charged is not None:
            self.shop.cashier.charges.delivered(self.charged.outpoint, self.charged.request)
            self.shop.under_way.done((self.charged.outpoint, self.charged.request))

    async def give_back(self, to_sat: Sat = Sat(0)) -> None:
        """Lower the charge on disk; if that fails now, the charge stays, and the payer may repeat the request.

        The failure of a repetition takes back nothing that an earlier delivery cost.
        """
        charged, key, under_way = self.charged, self.key, self.shop.under_way
        if charged is None or key is None:
            return
        is_over, to_sat = not to_sat, max(to_sat, under_way.least_sat(key))
        if charged.charged_sat <= to_sat:
            under_way.lowered(key, charged.charged_sat, is_over=is_over)
            return
        lowered = await self.shop.cashier.charges.release(charged.outpoint, charged.request, to_sat)
        if isinstance(lowered, PaychanError):
            log.warning("charge not given back", channel=str(charged.outpoint), reason=str(lowered))
        else:
            self.charged = lowered
        under_way.lowered(key, self.charged.charged_sat if self.charged else Sat(0), is_over=is_over)

    def give_back_later(self) -> None:
        """Give back the price of a request that is being cancelled before its answer began."""
        key = self.key
        if key is None or self.has_begun:
            return
        self.shop.cashier.charges.release_later(*key, self.shop.under_way.least_sat(key))
        self.shop.under_way.lowered(key, Sat(0), is_over=True)

    def tell_origin(self, headers: CIMultiDict[str]) -> None:
        """Say in the customary fields where the request came from; what a stranger wrote there is replaced."""
        address, scheme, host = self.shop.client_of(self.request)
        headers["Host"] = host
        headers["X-Forwarded-For"] = address
        headers["X-Forwarded-Proto"] = scheme
        headers["X-Forwarded-Host"] = host
        headers.popall("Forwarded", None)

    async def fail(self, error: BaseException) -> web.Response:
        """Give the price back, and answer that the upstream gave no answer."""
        if self.request.transport is not None:  # a payer that has gone says nothing about the upstream
            self.shop.failing.warning(upstream=self.route.upstream, reason=f"{type(error).__name__}: {error}")
        await self.give_back()
        response = refused(self.request, UpstreamFailed(), 504 if isinstance(error, TimeoutError) else 502)
        self.success(response.headers)
        return response


def refused(request: web.BaseRequest, error: PaychanError, status: int | None = None) -> web.Response:
    """Answer with an error of the gateway itself."""
    response = web.json_response(
        {"error": {"code": error.code, "message": error.public_text or str(error)}},
        status=status or error.http_status,
        headers=CIMultiDict([*CORS, ("Cache-Control", "no-store")]),
    )
    if response.status == 503 or isinstance(error, RequestUnderWay):
        response.headers["Retry-After"] = "1"
    if request.body_exists or isinstance(error, Malformed):
        response.force_close()  # its body is not read; another parser may have found another request in it
    return response
