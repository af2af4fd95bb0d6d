"""Transports for httpx that pay: `httpx.Client(transport=PaidTransport(purse))`.

httpx follows redirects above its transport, so each hop is a request of its own, judged by its own host. The payment's
headers are added to a copy of the request, so no redirect and no log of the program has them. The extension `paychan` of
a paid response is its `Bill`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing

import httpx

from paychan.client.paying.bodies import BUFFER_BYTES, Kept, keep, keep_async, whole, whole_async
from paychan.client.paying.budget import host_of
from paychan.client.paying.demands import MOST_BODY_BYTES, Headers, is_for_voucher, is_paid_already
from paychan.client.paying.drive import drive, drive_async
from paychan.client.paying.exchange import Answer, Bill, Purse, exchange_whole
from paychan.client.paying.paying import Request
from paychan.client.paying.reading import pieces, pieces_async
from paychan.client.paying.streams import Stream, stream_of, top_up


class _Rest(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body whose beginning was read already."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def __iter__(self) -> Iterator[bytes]:
        return whole(self._kept)

    def __aiter__(self):  # type: ignore[no-untyped-def] # noqa: ANN204 - an asynchronous generator
        return whole_async(self._kept)


class _Metered(httpx.SyncByteStream):
    """The body of an answer that is paid while it is read."""

    def __init__(
        self, inner: httpx.SyncByteStream, stream: Stream, pay: Callable[[], None], response: httpx.Response
    ) -> None:
        self._inner, self._stream, self._pay, self._response = inner, stream, pay, response

    def __iter__(self) -> Iterator[bytes]:
        yield from pieces(self._stream, iter(self._inner), self._pay)
        self._response.extensions["paychan"] = self._stream.bill

    def close(self) -> None:
        self._inner.close()


class _AsyncMetered(httpx.AsyncByteStream):
    """Does what `_Metered` does, on the event loop."""

    def __init__(
        self,
        inner: httpx.AsyncByteStream,
        stream: Stream,
        pay: Callable[[], Awaitable[None]],
        response: httpx.Response,
    ) -> None:
        self._inner, self._stream, self._pay, self._response = inner, stream, pay, response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with aclosing(pieces_async(self._stream, aiter(self._inner), self._pay)) as paid:
            async for piece in paid:
                yield piece
        self._response.extensions["paychan"] = self._stream.bill

    async def aclose(self) -> None:
        await self._inner.aclose()


class PaidTransport(httpx.BaseTransport):
    """Pays requests that are answered with 402.

    Args:
        purse: wallet and budget.
        inner: sends the requests; default: one that takes proxies from the environment.
        buffer_bytes: longest streamed body that is kept for the paid request.
    """

    def __init__(
        self, purse: Purse, inner: httpx.BaseTransport | None = None, *, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        from paychan.client.transport.proxy import ProxyTransport

        self._purse, self._buffer_bytes = purse, buffer_bytes
        self._inner = inner or ProxyTransport(httpx.create_ssl_context)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and pay for it if needed. Raises as `exchange`, and what the inner transport raises."""
        if _is_paid_already(request):
            return self._inner.handle_request(request)
        assert isinstance(request.stream, httpx.SyncByteStream)
        kept = keep(request.stream, self._buffer_bytes)

        def send(headers: Headers) -> tuple[httpx.Response, Answer]:
            response = self._inner.handle_request(_copy(request, kept, headers))
            return response, _answer(response, _start(response) if headers and response.status_code == 402 else b"")

        asked = _read(request, kept, self._buffer_bytes)
        response, done = drive(exchange_whole(self._purse, asked), send, lambda response: response.close())
        if (stream := stream_of(self._purse, asked, done)) is not None:

            def send_voucher(headers: Headers) -> tuple[httpx.Response, Answer]:
                response = self._inner.handle_request(_voucher(request, headers))
                return response, _answer(response, b"")

            def pay() -> None:
                drive(top_up(stream), send_voucher, lambda response: response.close(), is_last_mine=True)
                response.extensions["paychan"] = stream.bill

            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = _Metered(response.stream, stream, pay, response)
        return _with_bill(response, None if done is None else done.bill)

    def close(self) -> None:
        self._inner.close()


class AsyncPaidTransport(httpx.AsyncBaseTransport):
    """Do what `PaidTransport` does, on the event loop."""

    def __init__(
        self, purse: Purse, inner: httpx.AsyncBaseTransport | None = None, *, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        from paychan.client.transport.proxy import AsyncProxyTransport

        self._purse, self._buffer_bytes = purse, buffer_bytes
        self._inner = inner or AsyncProxyTransport(httpx.create_ssl_context)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Do what `PaidTransport.handle_request` does."""
        if _is_paid_already(request):
            return await self._inner.handle_async_request(request)
        assert isinstance(request.stream, httpx.AsyncByteStream)
        kept = await keep_async(request.stream, self._buffer_bytes)

        async def send(headers: Headers) -> tuple[httpx.Response, Answer]:
            response = await self._inner.handle_async_request(_copy(request, kept, headers))
            is_refused = bool(headers) and response.status_code == 402
            return response, _answer(response, await _start_async(response) if is_refused else b"")

        asked = _read(request, kept, self._buffer_bytes)
        flow = exchange_whole(self._purse, asked)
        response, done = await drive_async(flow, send, lambda response: response.aclose())
        if (stream := stream_of(self._purse, asked, done)) is not None:

            async def send_voucher(headers: Headers) -> tuple[httpx.Response, Answer]:
                response = await self._inner.handle_async_request(_voucher(request, headers))
                return response, _answer(response, b"")

            async def pay() -> None:
                await drive_async(top_up(stream), send_voucher, lambda response: response.aclose(), is_last_mine=True)
                response.extensions["paychan"] = stream.bill

            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _AsyncMetered(response.stream, stream, pay, response)
        return _with_bill(response, None if done is None else done.bill)

    async def aclose(self) -> None:
        await self._inner.aclose()


def _with_bill(response: httpx.Response, bill: Bill | None) -> httpx.Response:
    if bill is not None:
        response.extensions["paychan"] = bill
    return response


def _is_paid_already(request: httpx.Request) -> bool:
    return is_paid_already(request.headers.keys(), request.headers.get("authorization", ""))


def _read(request: httpx.Request, kept: Kept, buffer_bytes: int) -> Request:
    url = request.url
    return Request(
        request.method,
        str(url),
        host_of(url.scheme, url.raw_host.decode("ascii"), url.port),
        frozenset(name.lower() for name in request.headers),
        kept.digest,
        buffer_bytes,
    )


def _copy(request: httpx.Request, kept: Kept, headers: Headers) -> httpx.Request:
    """Return the request with headers added; its body may be sent again."""
    added = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]
    return httpx.Request(
        request.method,
        request.url,
        headers=[*request.headers.raw, *added],
        stream=httpx.ByteStream(kept.start) if kept.rest is None else _Rest(kept),
        extensions=request.extensions,
    )


def _voucher(request: httpx.Request, headers: Headers) -> httpx.Request:
    """Return the second request to the same URL, which brings a payment for the answer of the first."""
    kept = [(name, value) for name, value in request.headers.multi_items() if is_for_voucher(name)]
    return httpx.Request("HEAD", request.url, headers=[*kept, *headers], extensions=request.extensions)


def _answer(response: httpx.Response, body: bytes) -> Answer:
    headers = tuple((name.lower(), value) for name, value in response.headers.multi_items())
    return Answer(response.status_code, headers, body)


def _start(response: httpx.Response) -> bytes:
    body = bytearray()
    for part in response.iter_raw():
        body += part
        if len(body) >= MOST_BODY_BYTES:
            break
    return bytes(body)


async def _start_async(response: httpx.Response) -> bytes:
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) >= MOST_BODY_BYTES:
            break
    return bytes(body)
