"""Prices for handlers of Tornado. It has no middleware, so a `Paywall` has the decorator.

wall = Paywall(".paychan/debug/merchant.sock")

class Tile(RequestHandler):
@wall.priced(25)
async def get(self): ...
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.web import RequestHandler

from paychan.protocol.wire.merchant import Ready, Unit
from paychan.sell.exchange import Exchange, Rules
from paychan.sell.link import AsyncLink, Place
from paychan.sell.pricing import PaymentDue, Sold, current
from paychan.sell.requests import Price, Priced, Request, first_values, is_private, price_of, told


class Paywall:
    """Charges requests before handlers see them. One for a process.

    Args:
        merchant, token_file: where the server's merchant interface is; see `link.Place`.
        gives_back: returns whether an answer with this status gives the price back; default: 500 and above.
        free_when_away: serve requests for nothing while the paychan server is away; default: answer 503.
        public_url: base of the URLs that payers request, such as https://shop.example; default: from the request.
    """

    def __init__(
        self,
        merchant: str | os.PathLike[str] | None = None,
        *,
        token_file: str | os.PathLike[str] | None = None,
        gives_back: Callable[[int], bool] = lambda status: status >= 500,
        free_when_away: bool = False,
        public_url: str = "",
    ) -> None:
        self.link = AsyncLink(Place(merchant, token_file))
        self.rules = Rules(gives_back, free_when_away)
        self.public_url = public_url.rstrip("/")

    def priced(
        self, price: Priced | None = None, *, ceiling: int | None = None, unit: Unit = "request", description: str = ""
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Put a price on a method of a `RequestHandler`; see `pricing.priced`. `self.paychan` is the `Sold`."""
        if (price is None) == (ceiling is None):
            msg = "priced: want either a price or a ceiling"
            raise TypeError(msg)
        chosen = price if price is not None else Price(ceiling or 0, is_ceiling=True)

        def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            async def priced_method(handler: RequestHandler, *args: Any, **kwargs: Any) -> None:
                visit = _Visit(self, handler, kwargs)
                found = price_of(chosen, visit.exchange.request)
                if not isinstance(price, Price):
                    found = Price(found.sat, found.is_ceiling, unit, found.realm, found.description or description)
                await visit.serve(found, lambda: method(handler, *args, **kwargs))

            return priced_method

        return decorate

    async def close(self) -> None:
        """Close the connections to the server."""
        await self.link.close()


class _Visit:
    """One request."""

    def __init__(self, wall: Paywall, handler: RequestHandler, arguments: dict[str, Any]) -> None:
        self._wall, self._handler = wall, handler
        request: HTTPServerRequest = handler.request
        headers = list(request.headers.get_all())
        url = (wall.public_url or f"{request.protocol}://{request.host}") + (request.uri or "/")
        asked = Request(request.method or "GET", url, first_values(headers), arguments)
        self.exchange = Exchange(wall.rules, asked, told(headers))
        for name in {name for name, value in headers if is_private(name.lower(), value)}:
            del request.headers[name]
        handler.paychan = Sold(self.exchange)  # type: ignore[attr-defined] # for the seller's method
        self._settling: asyncio.Task[None] | None = None
        self._has_left = False
        self._flush = handler.flush
        self._finish = handler.finish
        self._finishing: asyncio.Future[None] | None = None

    async def pay_async(self, price: Price) -> None:
        """Charge the request; raises `PaymentDue`."""
        body = self._handler.request.body
        digest = hashlib.sha256(body).hexdigest() if isinstance(body, bytes) else None
        await self._wall.link.drive(self.exchange.pay(price, digest))
        if self.exchange.answer is not None:
            raise PaymentDue

    def pay(self, price: Price) -> None:  # noqa: ARG002 - as the interface has it
        """Refuse: handlers run on the event loop."""
        msg = "Tornado's handlers are priced by Paywall.priced"
        raise RuntimeError(msg)

    async def serve(self, price: Price, run: Callable[[], Any]) -> None:
        """Charge, run the method, and settle the price before the answer leaves."""
        handler = self._handler
        try:
            await self.pay_async(price)
        except PaymentDue:
            assert self.exchange.answer is not None
            _answer(handler, self.exchange.answer)
            return
        handler.flush = self._flush_settled  # type: ignore[method-assign]
        handler.finish = self._finish_settled  # type: ignore[method-assign]
        token = current.set(self)
        try:
            result = run()
            if isinstance(result, Awaitable):
                await result
            if self._finishing is None and not handler._finished and handler._auto_finish:  # noqa: SLF001 - as Tornado's own
                await handler.finish()
        except BaseException:
            if not self._has_left:
                await asyncio.shield(self._wall.link.drive(self.exchange.give_back()))
            raise
        finally:
            current.reset(token)
            if self._finishing is not None:
                await asyncio.wait([self._finishing])
            if not self._has_left:
                await self._wall.link.drive(self.exchange.give_back())

    def _settled(self) -> asyncio.Task[None]:
        if self._settling is None:
            self._settling = asyncio.ensure_future(self._settle())
        return self._settling

    async def _settle(self) -> None:
        """Settle the price, and write the headers. If the payer is gone, sending them fails, and `serve` gives back."""
        handler = self._handler
        headers = list(handler._headers.get_all())  # noqa: SLF001 - Tornado shows them by no method
        settled = await self._wall.link.drive(self.exchange.begin(handler.get_status(), headers))
        assert isinstance(settled, list)
        for name in {name for name, _ in headers}:
            handler.clear_header(name)
        for name, value in settled:
            handler.add_header(name, value)

    def _flush_settled(self, include_footers: bool = False) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._pass_on(lambda: self._flush(include_footers)))

    def _finish_settled(self, chunk: Any = None) -> asyncio.Future[None]:
        if self._finishing is None:
            self._finishing = asyncio.ensure_future(self._pass_on(lambda: self._finish(chunk)))
        return self._finishing

    async def _pass_on(self, send: Callable[[], Any]) -> None:
        await self._settled()
        handler = self._handler
        handler.flush = self._flush  # type: ignore[method-assign]
        await send()
        if not self._has_left:
            self._has_left = True
            await self._wall.link.drive(self.exchange.delivered())


def _answer(handler: RequestHandler, ready: Ready) -> None:
    handler.clear()
    handler.set_status(ready.status)
    for name, value in ready.headers:
        handler.set_header(name, value)
    handler.finish(ready.body)
