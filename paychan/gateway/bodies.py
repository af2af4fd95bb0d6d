"""Bodies on their way through the gateway, in chunks: memory does not depend on their size.

Every wait has its limit. A payer has `idle_seconds` for its next bytes; the upstream has `idle_seconds` to take them,
and `first_byte_seconds` from the end of the request to the end of the head of its answer, however slowly that arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from paychan.gateway.pricefile import Timeouts
from paychan.protocol.errors import Malformed

SMALL_BODY_BYTES = 65_536
"""A request body up to this size is read before the payment is judged, and is a part of the request's id."""


async def small_body(request: web.BaseRequest, idle_seconds: float) -> bytes | None:
    """Read a small body as a whole; None: it is large, or its size is unknown. Raises `Malformed`."""
    if not request.body_exists:
        return b""
    length = request.content_length
    if length is None or length > SMALL_BODY_BYTES:
        return None
    await _go_ahead(request)
    try:
        async with asyncio.timeout(idle_seconds):
            return await request.content.read()
    except TimeoutError:
        raise Malformed(field="body", reason="it did not arrive in time") from None


async def chunks_to_upstream(
    request: web.BaseRequest, limits: Timeouts, deadline: asyncio.Timeout
) -> AsyncIterator[bytes]:
    """Yield the payer's body. `deadline` holds for the upstream: it rests while the payer is waited for."""
    loop = asyncio.get_running_loop()
    deadline.reschedule(None)
    await _go_ahead(request)
    while True:
        async with asyncio.timeout(limits.idle_seconds):
            chunk = await request.content.readany()
        if not chunk:
            deadline.reschedule(loop.time() + limits.first_byte_seconds)
            return
        deadline.reschedule(loop.time() + limits.idle_seconds)
        yield chunk
        deadline.reschedule(None)


async def chunks_of_answer(answer: aiohttp.ClientResponse, idle_seconds: float) -> AsyncIterator[bytes]:
    """Yield the upstream's body. Raises `TimeoutError`."""
    while True:
        async with asyncio.timeout(idle_seconds):
            chunk = await answer.content.readany()
        if not chunk:
            return
        yield chunk


async def _go_ahead(request: web.BaseRequest) -> None:
    """Ask for the body if the payer waits for that (RFC 9110, 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
