"""An adapter for requests that pays: `session.mount("https://", PaidAdapter(purse))`. Needs `paychan[requests]`.

A session follows redirects above its adapters, so each hop is a request of its own, judged by its own host. The attribute
`paychan` of a response is its `Bill`, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from requests import PreparedRequest, Response
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.util import parse_url

from paychan.client.paying.bodies import BUFFER_BYTES, Kept, keep, whole
from paychan.client.paying.budget import host_of
from paychan.client.paying.demands import MOST_BODY_BYTES, Headers, is_for_voucher, is_paid_already
from paychan.client.paying.drive import drive
from paychan.client.paying.exchange import Answer, Purse, exchange_whole
from paychan.client.paying.paying import Request
from paychan.client.paying.reading import pieces
from paychan.client.paying.streams import Stream, stream_of, top_up

_PART_BYTES = 64 * 1024


class PaidAdapter(BaseAdapter):
    """Pays requests that are answered with 402.

    Args:
        purse: wallet and budget.
        inner: sends the requests; default: `requests.adapters.HTTPAdapter`.
        buffer_bytes: longest streamed body that is kept for the paid request.
    """

    def __init__(self, purse: Purse, inner: BaseAdapter | None = None, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        super().__init__()
        self._purse, self._inner, self._buffer_bytes = purse, inner or HTTPAdapter(), buffer_bytes

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        """Send a request, and pay for it if needed. Raises as `exchange`, and what the inner adapter raises."""
        if is_paid_already((name.lower() for name in request.headers), request.headers.get("Authorization", "")):
            return self._inner.send(request, *args, **options)
        kept = keep(_parts(request.body), self._buffer_bytes)

        def send(headers: Headers) -> tuple[Response, Answer]:
            response = self._inner.send(_copy(request, kept, headers), *args, **options)
            response.request = request
            return response, _answer(response, paid=bool(headers))

        asked = _read(request, kept, self._buffer_bytes)
        response, done = drive(exchange_whole(self._purse, asked), send, lambda response: response.close())
        response.paychan = None if done is None else done.bill  # type: ignore[attr-defined]
        if (stream := stream_of(self._purse, asked, done)) is not None:

            def send_voucher(headers: Headers) -> tuple[Response, Answer]:
                response = self._inner.send(_voucher(request, headers), *args, **options)
                return response, _answer(response, paid=False)

            def pay() -> None:
                drive(top_up(stream), send_voucher, lambda response: response.close(), is_last_mine=True)
                response.paychan = stream.bill  # type: ignore[attr-defined]

            response.raw = _Metered(response, stream, pay)
        return response

    def close(self) -> None:
        self._inner.close()


class _Metered:
    """The body of an answer that is paid while it is read, in the place of urllib3's response."""

    def __init__(self, response: Response, stream: Stream, pay: Callable[[], None]) -> None:
        self._inner, self._stream, self._response = response.raw, stream, response
        self._paid = pieces(stream, self._inner.stream(_PART_BYTES, decode_content=True), pay)
        self._rest = b""

    def stream(self, amt: int | None = _PART_BYTES, **_: Any) -> Iterator[bytes]:
        """Yield parts as they arrive, of at most `amt` bytes."""
        while piece := self._next(amt):
            yield piece

    def read(self, amt: int | None = None, **_: Any) -> bytes:
        """Read up to `amt` bytes, or all."""
        return self._next(amt) if amt is not None else b"".join(self.stream(None))

    def _next(self, amt: int | None) -> bytes:
        if not self._rest:
            try:
                self._rest = next(self._paid, b"")
            except BaseException:
                self._inner.close()  # the rest of the answer comes no more; requests would keep its connection open
                raise
            self._response.paychan = self._stream.bill  # type: ignore[attr-defined]
        piece, self._rest = self._rest[:amt], b"" if amt is None else self._rest[amt:]
        return piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _parts(body: Any) -> Iterable[bytes]:
    """Return a body of requests in parts: bytes, a text, a file, or an iterator of bytes."""
    if body is None:
        return ()
    if isinstance(body, str):
        return (body.encode(),)
    if isinstance(body, bytes | bytearray):
        return (bytes(body),)
    return _file(body) if hasattr(body, "read") else (_bytes(part) for part in body)


def _file(body: Any) -> Iterator[bytes]:
    while part := body.read(_PART_BYTES):
        yield _bytes(part)


def _bytes(part: Any) -> bytes:
    return part.encode() if isinstance(part, str) else bytes(part)


def _copy(request: PreparedRequest, kept: Kept, headers: Headers) -> PreparedRequest:
    copy = request.copy()
    copy.headers.update(dict(headers))
    if request.body is not None:
        copy.body = kept.start if kept.rest is None else whole(kept)  # type: ignore[assignment]
    return copy


def _voucher(request: PreparedRequest, headers: Headers) -> PreparedRequest:
    """Return the second request to the same URL, which brings a payment for the answer of the first."""
    copy = request.copy()
    copy.method, copy.body = "HEAD", None
    copy.headers = type(copy.headers)({name: value for name, value in copy.headers.items() if is_for_voucher(name)})
    copy.headers.update(dict(headers))
    return copy


def _read(request: PreparedRequest, kept: Kept, buffer_bytes: int) -> Request:
    url = request.url or ""
    parts = parse_url(url)
    names = frozenset(name.lower() for name in request.headers)
    host = host_of(parts.scheme or "", parts.host or "", parts.port)
    return Request(request.method or "GET", url, host, names, kept.digest, buffer_bytes)


def _answer(response: Response, *, paid: bool) -> Answer:
    raw = getattr(response.raw, "headers", response.headers)
    headers = tuple((name.lower(), value) for name, value in raw.items())
    if not paid or response.status_code != 402:
        return Answer(response.status_code, headers)
    return Answer(response.status_code, headers, next(response.iter_content(MOST_BODY_BYTES), b""))
