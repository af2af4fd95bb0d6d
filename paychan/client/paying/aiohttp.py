"""A middleware for aiohttp's client that pays: `ClientSession(middlewares=[PaidMiddleware(purse)])`. Needs `paychan[aiohttp]`.

aiohttp calls its middlewares for each hop of a redirect, so each hop is judged by its own host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.payload import BytesPayload, Payload

from paychan.client.paying.bodies import BUFFER_BYTES
from paychan.client.paying.budget import host_of
from paychan.client.paying.demands import MOST_BODY_BYTES, Headers, is_for_voucher, is_paid_already
from paychan.client.paying.drive import drive_async
from paychan.client.paying.exchange import Answer, Purse, exchange_whole
from paychan.client.paying.paying import Request
from paychan.client.paying.reading import pieces_async
from paychan.client.paying.streams import Stream, stream_of, top_up


class PaidMiddleware:
    """Pays requests that are answered with 402.

    Args:
        purse: wallet and budget.
        buffer_bytes: longest body other than bytes that is kept for the paid request. aiohttp must know its size before;
            a body of an asynchronous iterator can't be paid for.
    """

    def __init__(self, purse: Purse, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._purse, self._buffer_bytes = purse, buffer_bytes

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Send a request, and pay for it if needed. Raises as `exchange`, and what aiohttp raises."""
        own = request.headers.copy()
        if is_paid_already((name.lower() for name in own), own.get("Authorization", "")):
            return await handler(request)
        digest = await self._digest(request)

        async def send(headers: Headers) -> tuple[ClientResponse, Answer]:
            for name, value in headers:
                request.headers[name] = value
            try:
                response = await handler(request)
            finally:
                for name, _ in headers:
                    del request.headers[name]
                    request.headers.extend([(name, value) for value in own.getall(name, [])])
            is_refused = bool(headers) and response.status == 402
            return response, _answer(response, await response.content.read(MOST_BODY_BYTES) if is_refused else b"")

        asked = self._read(request, digest)
        response, done = await drive_async(exchange_whole(self._purse, asked), send, _drop)
        if (stream := stream_of(self._purse, asked, done)) is not None:

            async def send_voucher(headers: Headers) -> tuple[ClientResponse, Answer]:
                kept = [(name, value) for name, value in own.items() if is_for_voucher(name)]
                voucher = await request.session.request(
                    "HEAD",
                    request.url,
                    headers=[*kept, *headers],
                    allow_redirects=False,
                    raise_for_status=False,
                    middlewares=(),
                )
                return voucher, _answer(voucher, b"")

            async def pay() -> None:
                await drive_async(top_up(stream), send_voucher, _drop, is_last_mine=True)

            response.content = _Metered(response.content, stream, pay)
        return response

    def _read(self, request: ClientRequest, digest: bytes | None) -> Request:
        url = request.url
        names = frozenset(name.lower() for name in request.headers)
        host = host_of(url.scheme, url.raw_host or "", url.port)
        return Request(request.method, str(url), host, names, digest, self._buffer_bytes)

    async def _digest(self, request: ClientRequest) -> bytes | None:
        """Return the SHA-256 of the body, which is bytes afterwards; None for a body that can be sent once only."""
        body = request.body
        if not isinstance(body, Payload):
            return sha256(body).digest()
        if isinstance(body, BytesPayload):
            return sha256(await body.as_bytes()).digest()
        if body.size is None or body.size > self._buffer_bytes:
            return None
        raw = await body.as_bytes()
        await request.update_body(raw)
        return sha256(raw).digest()


class _Metered(StreamReader):
    """The body of an answer that is paid while it is read: what a reader waits for is fetched at that moment."""

    def __init__(self, inner: StreamReader, stream: Stream, pay: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(BaseProtocol(loop), 2**16, loop=loop)
        self._paid = pieces_async(stream, inner.iter_any(), pay)

    async def _wait(self, func_name: str) -> None:  # noqa: ARG002 - aiohttp names the caller
        """Fetch the next piece; aiohttp calls this if it has none."""
        try:
            self.feed_data(await anext(self._paid))
        except StopAsyncIteration:
            self.feed_eof()
        except BaseException as error:
            self.set_exception(error)
            raise


def _answer(response: ClientResponse, body: bytes) -> Answer:
    headers = tuple((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.raw_headers)
    return Answer(response.status, headers, body)


async def _drop(response: ClientResponse) -> None:
    response.release()
