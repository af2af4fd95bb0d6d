"""Middleware for WSGI: Flask, Django and every other program of that interface. Bodies of answers pass as they come."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias
from urllib.parse import quote

from paychan.protocol.wire.merchant import Ready
from paychan.sell.exchange import Exchange, Rules
from paychan.sell.link import Link, Place
from paychan.sell.pricing import PaymentDue, Sold, current
from paychan.sell.requests import Price, Priced, Request, first_values, is_private, price_of, told

Environ: TypeAlias = dict[str, Any]
Application: TypeAlias = Callable[[Environ, Any], Iterable[bytes]]

_REASONS = {200: "OK", 400: "Bad Request", 402: "Payment Required", 409: "Conflict", 503: "Service Unavailable"}
_NO_BODY = hashlib.sha256(b"").hexdigest()


class Paywall:
    """Charges requests before handlers see them.

    Args:
        app: the application.
        merchant, token_file: where the server's merchant interface is; see `link.Place`.
        price: price of every request of the application; default: handlers have prices by `priced`.
        gives_back: returns whether an answer with this status gives the price back; default: 500 and above.
        free_when_away: serve requests for nothing while the paychan server is away; default: answer 503.
        public_url: base of the URLs that payers request, such as https://shop.example; default: from the request.
        body_bytes: longest body that is read before the payment, so that a repeated request is known.
    """

    def __init__(
        self,
        app: Application,
        merchant: str | os.PathLike[str] | None = None,
        *,
        token_file: str | os.PathLike[str] | None = None,
        price: Priced | None = None,
        gives_back: Callable[[int], bool] = lambda status: status >= 500,
        free_when_away: bool = False,
        public_url: str = "",
        body_bytes: int = 65_536,
    ) -> None:
        self.app, self.price = app, price
        self.link = Link(Place(merchant, token_file))
        self.rules = Rules(gives_back, free_when_away)
        self.public_url, self.body_bytes = public_url.rstrip("/"), body_bytes

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        visit = _Visit(self, environ)
        token = current.set(visit)
        try:
            if self.price is not None:
                visit.pay(price_of(self.price, visit.exchange.request))
            return visit.serve(start_response)
        except BaseException:
            if visit.exchange.answer is not None:
                return _answered(visit.exchange.answer, visit.exchange.request.method, start_response)
            self.link.drive(visit.exchange.give_back())
            raise
        finally:
            current.reset(token)

    def close(self) -> None:
        """Close the connections to the server."""
        self.link.close()


class _Visit:
    """One request."""

    def __init__(self, wall: Paywall, environ: Environ) -> None:
        self._wall, self._environ = wall, environ
        headers = _headers(environ)
        request = Request(environ["REQUEST_METHOD"], _url(environ, wall.public_url), first_values(headers))
        self.exchange = Exchange(wall.rules, request, told(headers))
        for name, value in headers:
            if is_private(name, value):
                del environ[_key(name)]
        environ["paychan"] = Sold(self.exchange)

    def pay(self, price: Price) -> None:
        """Charge the request; raises `PaymentDue`."""
        digest = self._read_body() if self.exchange.brings_payment else None
        self._wall.link.drive(self.exchange.pay(price, digest))
        if self.exchange.answer is not None:
            raise PaymentDue

    async def pay_async(self, price: Price) -> None:
        """Charge the request for a handler that runs on an event loop of the framework; raises `PaymentDue`."""
        await asyncio.to_thread(self._pay_quietly, price)
        if self.exchange.answer is not None:
            raise PaymentDue

    def _pay_quietly(self, price: Price) -> None:
        try:
            self.pay(price)
        except PaymentDue:
            return

    def _read_body(self) -> str | None:
        """Read a body that is not too long, and keep it for the handler; return its digest.

        None: it is long, its length is not known, or the handler's framework has read it already.
        """
        length = self._environ.get("CONTENT_LENGTH") or "0"
        if "HTTP_TRANSFER_ENCODING" in self._environ or not length.isdecimal():
            return None
        if int(length) == 0:
            return _NO_BODY
        if int(length) > self._wall.body_bytes:
            return None
        body = self._environ["wsgi.input"].read(int(length))
        if len(body) < int(length):
            return None
        self._environ["wsgi.input"] = io.BytesIO(body)
        return hashlib.sha256(body).hexdigest()

    def serve(self, start_response: Any) -> Iterable[bytes]:
        """Run the application until its first bytes, settle the price, and pass the answer on."""
        head: list[Any] = []
        written: list[bytes] = []

        def note(status: str, headers: list[tuple[str, str]], error: Any = None) -> Callable[[bytes], None]:
            head[:] = [status, headers, error]
            return written.append

        parts = self._wall.app(self._environ, note)
        try:
            rest = iter(parts)
            first = next((part for part in rest if part or self.exchange.answer is not None), b"")
            self._check_paid()
            status, headers, error = head
            settled = self._wall.link.drive(self.exchange.begin(int(status[:3]), headers))
        except BaseException:
            _close(parts)
            raise
        start_response(status, settled, error) if error else start_response(status, settled)
        return _Body(self, parts, b"".join(written) + first, rest)

    def _check_paid(self) -> None:
        """Raise `PaymentDue` if a framework made an answer of it."""
        if self.exchange.answer is not None:
            raise PaymentDue

    def left(self, *, is_away: bool) -> None:
        """Tell the server how the answer ended: its first byte has left, or the payer was gone before."""
        self._wall.link.drive(self.exchange.give_back() if is_away else self.exchange.delivered())


class _Body:
    """The body of an answer. A server that closes it before it asks for a second part could not send the first."""

    def __init__(self, visit: _Visit, parts: Iterable[bytes], first: bytes, rest: Iterator[bytes]) -> None:
        self._visit, self._parts, self._rest = visit, parts, rest
        self._first: bytes | None = first
        self._has_left = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first is not None:
            first, self._first = self._first, None
            if first:
                return first
        if not self._has_left:
            self._has_left = True
            self._visit.left(is_away=False)
        return next(self._rest)

    def close(self) -> None:
        """End the answer."""
        try:
            if not self._has_left:
                self._has_left = True
                self._visit.left(is_away=True)
        finally:
            _close(self._parts)


def _close(parts: Any) -> None:
    if hasattr(parts, "close"):
        parts.close()


def _answered(ready: Ready, method: str, start_response: Any) -> Iterable[bytes]:
    body = ready.body.encode()
    headers = [*ready.headers, ("Content-Length", str(len(body)))]
    start_response(f"{ready.status} {_REASONS.get(ready.status, 'Refused')}", headers)
    return [b"" if method == "HEAD" else body]


def _headers(environ: Environ) -> list[tuple[str, str]]:
    """Return the request's headers, names in lower case. WSGI joins repeated ones by a comma."""
    return [
        (key[5:].replace("_", "-").lower(), value)
        for key, value in environ.items()
        if key.startswith("HTTP_") and isinstance(value, str)
    ]


def _key(name: str) -> str:
    return "HTTP_" + name.upper().replace("-", "_")


def _url(environ: Environ, public_url: str) -> str:
    """Return the URL as the payer sees it."""
    raw = str(environ.get("RAW_URI") or environ.get("REQUEST_URI") or "")
    if raw.startswith("/"):
        target = raw
    else:
        path = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin1")
        target = quote(path, safe="/:@!$&'()*+,;=~-._") or "/"
        if environ.get("QUERY_STRING"):
            target += "?" + environ["QUERY_STRING"]
    if public_url:
        return public_url + target
    host = environ.get("HTTP_HOST") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
    return f"{environ['wsgi.url_scheme']}://{host}{target}"
