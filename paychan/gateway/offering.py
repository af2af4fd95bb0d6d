"""402 answers: an offer in x402 and in MPP at once, with a problem body for programs or a page for browsers.

Strangers ask for prices at no cost to them, so an answer costs the server a few microseconds: everything but the URL is
built once for each route, host and minute. `Offering` keeps nothing of a request; a challenge proves itself by its HMAC.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable
from email.utils import formatdate
from functools import lru_cache
from http.client import responses

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from paychan.gateway import page
from paychan.gateway.asking import Facts, takes_mpp, wants_page
from paychan.gateway.prices import Route
from paychan.protocol.errors import Failed, MethodNotAllowed, PaychanError, Unavailable
from paychan.protocol.types import UnixTime
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.mpp_challenge import Challenge, challenge_header
from paychan.protocol.wire.mpp_outcomes import PROBLEM_TYPE, problem_json
from paychan.protocol.wire.offers import ChannelState, Offer
from paychan.protocol.wire.x402_json import PaymentRequired, encode_header

SLOT_SECONDS = 60
"""Answers of one slot have the same challenge; it holds for `mpp.LIFETIME_SECONDS` beyond the end of the slot."""

_MOST_PREPARED = 512
"""Routes and hosts whose answer is prepared at a time, about 10 kB each. A Host header is a stranger's word."""

_MOST_URL = 2000
"""A longer URL is shown without its query: clients limit the size of a header."""

_RETRY_AFTER_SECONDS = 5

EXPOSED = "PAYMENT-REQUIRED, PAYMENT-RESPONSE, WWW-Authenticate, Payment-Receipt, X-Paychan-Receipt, Retry-After, Date"
"""Headers of answers that pages of other sites may read."""

CORS = (("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", EXPOSED))
"""For every answer of a priced route, paid ones too. No answer varies by `Origin`, and cookies are not shared."""

PREFLIGHT = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
    (
        "Access-Control-Allow-Headers",
        (
            "*, Authorization, Payment-Authorization, PAYMENT-SIGNATURE, Accept-Payment, Idempotency-Key, Content-Type, "
            "X-Paychan-Want-Receipt"
        ),
    ),
    ("Access-Control-Max-Age", "600"),
    ("Cache-Control", "no-store"),
)
"""Headers of the answer to a preflight of a priced route. The asterisk does not cover `Authorization`."""

_NO_STORE = (("Cache-Control", "no-store"), ("Vary", "Accept, Accept-Payment"), ("X-Content-Type-Options", "nosniff"))
_PAGE_HEADERS = (("Content-Security-Policy", page.POLICY), ("Referrer-Policy", "no-referrer"))

_PAGE_TYPE = "text/html; charset=utf-8"

_BAD_REQUESTS = frozenset({"malformed", "missing", "repeated", "payment_unsupported", "two_payments"})
"""Codes of requests that no other payment mends; every other refusal of a payment is a 402 with a fresh offer."""


class Answer(Struct, frozen=True):
    """A status, headers in their order without Date and Content-Length, and a body that a HEAD does not get."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class _Prepared(Struct, frozen=True):
    """The bytes of an answer around Date, URL and length."""

    before_date: bytes
    after_date: bytes
    json_before: bytes
    json_after: bytes
    body: bytes
    is_page: bool


class Offering:
    """Makes the 402 answers of one gateway. It is used on one thread."""

    def __init__(self, terms: Offer, secrets: Callable[[], tuple[bytes, ...]]) -> None:
        """Prepare nothing yet.

        Args:
            terms: identity, network, place and terms of new channels; amount, unit, realm and description are ignored.
            secrets: returns the HMAC keys of challenges, the newest first.
        """
        self._terms, self._secrets = terms, secrets
        self._prepared: dict[tuple[Route, str, bool, bool], _Prepared] = {}
        self._offers: dict[tuple[Route, str], Offer] = {}
        self._slot = -1

    @property
    def terms(self) -> Offer:
        return self._terms

    @terms.setter
    def terms(self, terms: Offer) -> None:
        """Change the terms of new channels from now on."""
        self._terms = terms
        self._prepared.clear()
        self._offers.clear()

    def offer(self, route: Route, asked: Facts) -> Offer:
        """Return what a request of this route is offered, and what its payment must have chosen."""
        realm = route.realm or asked.host
        found = self._offers.get((route, realm))
        if found is None:
            if len(self._offers) >= _MOST_PREPARED:
                self._offers.clear()
            found = self._offers[route, realm] = replace(
                self._terms, amount_sat=route.amount_sat, unit=route.unit, realm=realm, description=route.description
            )
        return found

    def answer(
        self, asked: Facts, route: Route, now: float, problem: PaychanError | None = None, *, closes: bool = False
    ) -> bytes:
        """Return a whole answer as bytes, for a request without a payment or one whose payment is refused.

        Args:
            asked: the request.
            route: its priced route.
            now: Unix time.
            problem: why the payment is refused; None if there is none.
            closes: whether the connection ends after this answer.
        """
        if problem is not None:
            return laid_out(
                self.structured(asked, route, now, problem), now, is_head=asked.method == "HEAD", closes=closes
            )
        ready = self._ready(asked, route, now)
        url = _shown_url(asked)
        required = b64encode(ready.json_before + msgspec.json.encode(url) + ready.json_after)
        body = page.filled(ready.body, url) if ready.is_page else ready.body
        return b"%b%b%b%b\r\nContent-Length: %d%b%b" % (
            ready.before_date,
            _date(int(now)),
            ready.after_date,
            required,
            len(body),
            b"\r\nConnection: close\r\n\r\n" if closes else b"\r\n\r\n",
            b"" if asked.method == "HEAD" else body,
        )

    def structured(
        self,
        asked: Facts,
        route: Route,
        now: float,
        problem: PaychanError | None = None,
        state: ChannelState | None = None,
    ) -> Answer:
        """Return an answer in parts, made for this request alone.

        With `state` it corrects the payer's view of a channel: both protocols show the channel and its newest payment as
        proof. Pass no state of a channel that is near its end: the payer then opens a new one.
        """
        status, offer, url = status_of(problem), self.offer(route, asked), _shown_url(asked)
        if problem is not None and status != 402:
            return refusal(problem, status)
        challenge = self._challenge(offer, now, state) if takes_mpp(asked.accept_payment) else None
        headers = [("WWW-Authenticate", challenge_header(challenge))] if challenge else []
        headers.append(("PAYMENT-REQUIRED", encode_header(_required(offer, route, url, problem, state))))
        if problem is None and wants_page(asked):
            body = page.filled(page.page(offer, is_ceiling=route.is_ceiling), url)
            return _answer(402, _PAGE_TYPE, [*_PAGE_HEADERS, *headers], body)
        return _answer(402, PROBLEM_TYPE, headers, _problem(offer, route, challenge, problem))

    def _challenge(self, offer: Offer, now: float, state: ChannelState | None = None) -> Challenge:
        ends = (int(now) // SLOT_SECONDS + 1) * SLOT_SECONDS + mpp.LIFETIME_SECONDS
        return mpp.challenge(offer, self._secrets()[0], UnixTime(ends), state=state)

    def _ready(self, asked: Facts, route: Route, now: float) -> _Prepared:
        slot = int(now) // SLOT_SECONDS
        if slot != self._slot:
            self._prepared.clear()
            self._slot = slot
        host = "" if route.realm else asked.host
        key = (route, host, wants_page(asked), takes_mpp(asked.accept_payment))
        found = self._prepared.get(key)
        if found is None:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            found = self._prepared[key] = self._prepare(asked, route, now)
        return found

    def _prepare(self, asked: Facts, route: Route, now: float) -> _Prepared:
        """Build the answer of `structured` once, and cut it where Date, URL and length belong."""
        offer, mark, is_page = self.offer(route, asked), page.URL_PLACE.decode(), wants_page(asked)
        before, _, after = msgspec.json.encode(_required(offer, route, mark)).partition(msgspec.json.encode(mark))
        challenge = self._challenge(offer, now) if takes_mpp(asked.accept_payment) else None
        headers = [("WWW-Authenticate", challenge_header(challenge))] if challenge else []
        if is_page:
            body = page.page(offer, is_ceiling=route.is_ceiling)
            answer = _answer(402, _PAGE_TYPE, [*_PAGE_HEADERS, *headers], body)
        else:
            answer = _answer(402, PROBLEM_TYPE, headers, _problem(offer, route, challenge, None))
        return _Prepared(
            before_date=_first_line(402) + b"Date: ",
            after_date=b"\r\n" + _lines(answer.headers) + b"PAYMENT-REQUIRED: ",
            json_before=before,
            json_after=after,
            body=answer.body,
            is_page=is_page,
        )


def status_of(problem: PaychanError | None) -> int:
    """Return the status of an answer: a refused payment gets 402 with a fresh offer, whatever its own status is."""
    if isinstance(problem, Unavailable | Failed):
        return problem.http_status
    return 400 if problem is not None and problem.code in _BAD_REQUESTS else 402


def refusal(problem: PaychanError, status: int = 0) -> Answer:
    """Return the answer to a request that no payment mends: an unlisted path, a wrong method, a server that must wait.

    Args:
        problem: the reason; a stranger reads its public text.
        status: another status than the problem's own.
    """
    status = status or problem.http_status
    headers = []
    if isinstance(problem, Unavailable):
        headers = [("Retry-After", str(problem.fields.get("wait_seconds", _RETRY_AFTER_SECONDS)))]
    if isinstance(problem, MethodNotAllowed):
        # RFC 9110 15.5.6: "The origin server MUST generate an Allow header field in a 405 response"
        headers = [("Allow", ", ".join(problem.fields.get("allowed", ())))]
    shown = {
        "type": "about:blank",
        "title": responses.get(status, "Refused"),
        "status": status,
        "detail": problem.public_text or str(problem),
        "code": problem.code,
    }
    return _answer(status, PROBLEM_TYPE, headers, msgspec.json.encode(shown) + b"\n")


def _answer(status: int, kind: str, headers: Iterable[tuple[str, str]], body: bytes) -> Answer:
    return Answer(status, (("Server", "paychan"), ("Content-Type", kind), *_NO_STORE, *CORS, *headers), body)


def laid_out(answer: Answer, now: float, *, is_head: bool, closes: bool = False) -> bytes:
    """Build the bytes of an answer; a HEAD gets the length of the body, and no body."""
    return b"%bDate: %b\r\n%bContent-Length: %d%b%b" % (
        _first_line(answer.status),
        _date(int(now)),
        _lines(answer.headers),
        len(answer.body),
        b"\r\nConnection: close\r\n\r\n" if closes else b"\r\n\r\n",
        b"" if is_head else answer.body,
    )


def preflight_answer(now: float, *, closes: bool = False) -> bytes:
    """Build the answer to a preflight of a priced route, which has no price: an OPTIONS with Access-Control-Request-Method.

    RFC 9110 8.6: "A server MUST NOT send a Content-Length header field in any response with a status code of 1xx
    (Informational) or 204 (No Content)"
    """
    end = b"Connection: close\r\n\r\n" if closes else b"\r\n"
    return b"%bDate: %b\r\n%b%b" % (_first_line(204), _date(int(now)), _PREFLIGHT_LINES, end)


def _required(
    offer: Offer, route: Route, url: str, problem: PaychanError | None = None, state: ChannelState | None = None
) -> PaymentRequired:
    return x402.payment_required(offer, url, mime_type=route.mime_type or None, error=problem, state=state)


def _problem(offer: Offer, route: Route, challenge: Challenge | None, problem: PaychanError | None) -> bytes:
    """Write the problem body, with the price in words that need no knowledge of a protocol."""
    price = {
        "priceSat": offer.amount_sat,
        "unit": offer.unit,
        "isCeiling": route.is_ceiling,
        "payUrl": offer.pay_url,
        "network": offer.network,
        "openPriceSat": offer.open_price_sat,
        "minConfirmations": offer.min_confirmations,
    }
    shown = problem_json(402, challenge.id if challenge else "", problem, price)
    if challenge is None:
        del shown["challengeId"]
    return msgspec.json.encode(shown) + b"\n"


def _shown_url(asked: Facts) -> str:
    return asked.url if len(asked.url) <= _MOST_URL else asked.url.partition("?")[0]


def _first_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {responses.get(status, 'Refused')}\r\n".encode()


def _lines(headers: Iterable[tuple[str, str]]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers).encode("latin1")


_PREFLIGHT_LINES = _lines((("Server", "paychan"), *PREFLIGHT))


@lru_cache(4)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()
