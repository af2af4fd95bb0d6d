"""WebSockets through the gateway: the upgrade is charged like a request, and metered units message by message.

A message of the upstream counts as an event. When the credit is used up, the payer gets the text message
`{"mpp":"payment-need-voucher","data":…}`, and answers with `{"mpp":"authorization","authorization":"Payment …"}`, which
goes to the cashier and not to the upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
import msgspec
from aiohttp import WSMsgType, web
from multidict import CIMultiDict
from yarl import URL

from paychan.gateway.cashier import Asked, Refusal
from paychan.gateway.forwarding import to_upstream
from paychan.gateway.front import connection_of
from paychan.gateway.metering import Meter, MeterEnded
from paychan.gateway.pricefile import KILOBYTE_BYTES
from paychan.gateway.sale import Sale, refused
from paychan.protocol.errors import Malformed
from paychan.protocol.request_id import NO_BODY
from paychan.protocol.types import Sat
from paychan.protocol.wire.mpp_outcomes import NEED_VOUCHER_EVENT

_OWN = ("sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol")
_MOST_MESSAGE_BYTES = 4_000_000
_POLICY_VIOLATION = 1008


def is_upgrade(request: web.BaseRequest) -> bool:
    """Say whether a request asks for a WebSocket; only a GET can, and the upstream gets a GET of the same price."""
    if request.method != "GET":
        return False
    wanted = {token.strip().lower() for token in request.headers.get("Connection", "").split(",")}
    return "upgrade" in wanted and request.headers.get("Upgrade", "").lower() == "websocket"


async def tunnel(sale: Sale) -> web.StreamResponse:
    """Open the upstream's WebSocket, then the payer's, and pass messages until one side ends."""
    request, route = sale.request, sale.route
    if not web.WebSocketResponse().can_prepare(request):
        await sale.give_back()
        response = refused(request, Malformed(field="Sec-WebSocket-Key", reason="this is no request for a WebSocket"))
        sale.success(response.headers)
        return response
    headers = to_upstream(request.headers, sale.charged)
    for name in _OWN:
        headers.popall(name, None)
    sale.tell_origin(headers)
    wanted = [
        name.strip() for value in request.headers.getall("Sec-WebSocket-Protocol", ()) for name in value.split(",")
    ]
    try:
        async with asyncio.timeout(route.timeouts.connect_seconds + route.timeouts.first_byte_seconds):
            upstream = await sale.shop.upstream.ws_connect(
                URL(route.upstream + sale.facts.target, encoded=True),
                headers=headers,
                protocols=wanted,
                autoping=False,
                autoclose=False,
                max_msg_size=_MOST_MESSAGE_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_close=5.0),
            )
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return await sale.fail(error)
    payer = web.WebSocketResponse(
        protocols=[upstream.protocol] if upstream.protocol else [],
        autoping=False,
        autoclose=False,
        max_msg_size=_MOST_MESSAGE_BYTES,
        compress=False,
    )
    payer.headers.extend(sale.success(CIMultiDict()))
    async with upstream:
        if request.transport is None:  # the payer has gone while the upstream was asked
            return await sale.fail(ConnectionResetError())
        await payer.prepare(request)
        sale.begin()
        await _Tunnel(sale, payer, upstream).run()
    return payer


class _Tunnel:
    def __init__(
        self,
        sale: Sale,
        payer: web.WebSocketResponse,
        upstream: aiohttp.ClientWebSocketResponse,
    ) -> None:
        self._sale, self._payer, self._upstream = sale, payer, upstream
        self._meter: Meter | None = None
        self._sent = 0
        if sale.route.is_metered and sale.paid is not None and sale.charged is not None:
            self._meter = Meter(sale.route, sale.paid, sale.charged, sale.shop.cashier)

    async def run(self) -> None:
        """Pass messages both ways; when one direction ends, both connections close."""
        both = [asyncio.create_task(self._to_payer()), asyncio.create_task(self._to_upstream())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            with contextlib.suppress(ConnectionError, RuntimeError):
                await self._payer.close()

    async def _to_payer(self) -> None:
        try:
            async for message in self._upstream:
                if self._meter is not None and message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    await self._pay_for(self._meter, message.data)
                await _pass(message, self._payer)
            await self._payer.close(code=self._upstream.close_code or 1000)
        except MeterEnded:
            await self._payer.close(code=_POLICY_VIOLATION, message=b"no payment came")

    async def _to_upstream(self) -> None:
        async for message in self._payer:
            if message.type is WSMsgType.TEXT and message.data.startswith('{"mpp":'):
                await self._take_payment(message.data)
            else:
                await _pass(message, self._upstream)
        await self._upstream.close(code=self._payer.close_code or 1000)

    async def _pay_for(self, meter: Meter, data: str | bytes) -> None:
        """Charge a message before it is sent; wait for payments while the credit is used up."""
        units = self._units(meter, len(data))
        while await meter.cover(units) < units:
            need = {"mpp": NEED_VOUCHER_EVENT, "data": meter.need()}
            await self._payer.send_str(msgspec.json.encode(need).decode())
            await meter.paused(self._sale.request)

    def _units(self, meter: Meter, size: int) -> int:
        unit = self._sale.route.unit
        if unit == "second":
            return meter.seconds()
        self._sent += 1 if unit == "event" else size
        return -(-self._sent // KILOBYTE_BYTES) if unit == "kilobyte" else self._sent

    async def _take_payment(self, text: str) -> None:
        """Book a payment that came as a message; a refused one is answered, and the tunnel goes on."""
        shown: Any = None
        with contextlib.suppress(msgspec.DecodeError):
            shown = msgspec.json.decode(text.encode())
        authorization = shown.get("authorization") if isinstance(shown, dict) else None
        facts, shop = self._sale.facts, self._sale.shop

        def fields(name: str) -> list[str]:
            return [authorization] if name == "Authorization" and isinstance(authorization, str) else []

        asked = Asked(facts.method, facts.url, fields, NO_BODY)
        paid = await shop.cashier.pay(asked, shop.offering.offer(self._sale.route, facts), Sat(0))
        if isinstance(paid, Refusal):
            connection = connection_of(self._sale.request)
            await connection.penalise(paid.error)
            if connection.penalty.problem() is not None:
                await self._payer.close(code=_POLICY_VIOLATION, message=b"too many bad payments")
            problem = {"mpp": "payment-error", "status": 402, "message": paid.error.public_text or str(paid.error)}
            with contextlib.suppress(ConnectionError):
                await self._payer.send_str(msgspec.json.encode(problem).decode())


async def _pass(message: aiohttp.WSMessage, to: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> None:
    match message.type:
        case WSMsgType.TEXT:
            await to.send_str(message.data)
        case WSMsgType.BINARY:
            await to.send_bytes(message.data)
        case WSMsgType.PING:
            await to.ping(message.data)
        case WSMsgType.PONG:
            await to.pong(message.data)
        case _:
            pass
