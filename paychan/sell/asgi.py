"""Middleware for ASGI: Starlette, FastAPI, Litestar and every other program of that interface.

Bodies of answers pass as they come. A WebSocket has no price: it passes if only handlers have prices, and is refused if the
whole application has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import quote

from paychan.protocol.wire.merchant import Ready
from paychan.sell.exchange import Exchange, Rules
from paychan.sell.link import AsyncLink, Place
from paychan.sell.pricing import PaymentDue, Sold, current
from paychan.sell.requests import Price, Priced, Request, first_values, is_private, price_of, told

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

_POLICY_VIOLATION = 1008


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
        self.link = AsyncLink(Place(merchant, token_file))
        self.rules = Rules(gives_back, free_when_away)
        self.public_url, self.body_bytes = public_url.rstrip("/"), body_bytes
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Visit(self, scope, receive, send).serve()
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self.app(scope, receive, self._closing(send) if scope["type"] == "lifespan" else send)

    async def close(self) -> None:
        """Close the connections to the server; the end of the program's lifespan does."""
        if self.tasks:
            await asyncio.wait(self.tasks)
        await self.link.close()

    def _closing(self, send: Send) -> Send:
        async def closing(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await self.close()
            await send(message)

        return closing

    async def _websocket(self, scope: Any, receive: Receive, send: Send) -> None:
        token = current.set(None)
        try:
            if self.price is not None:
                await receive()
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": "no price"})
            else:
                await self.app(_cleaned(scope), receive, send)
        finally:
            current.reset(token)

    def keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """Remember a task until it is done."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


class _Visit:
    """One request."""

    def __init__(self, wall: Paywall, scope: Any, receive: Receive, send: Send) -> None:
        self._wall, self._receive, self._send = wall, receive, send
        headers = [(name.decode("latin1"), value.decode("latin1")) for name, value in scope["headers"]]
        request = Request(scope["method"], _url(scope, headers, wall.public_url), first_values(headers))
        self.exchange = Exchange(wall.rules, request, told(headers))
        self._scope = _cleaned(scope)
        self._scope["paychan"] = Sold(self.exchange)
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._waiting: deque[Message] = deque()
        self._digest, self._size, self._is_read = hashlib.sha256(), 0, False
        self._watch: asyncio.Task[None] | None = None
        self._has_begun = self._has_left = False

    # --- price ---

    async def pay_async(self, price: Price) -> None:
        """Charge the request; raises `PaymentDue`."""
        digest = await self._read_body() if self.exchange.brings_payment else None
        paying = self._wall.keep(asyncio.create_task(_ended(self._wall.link.drive(self.exchange.pay(price, digest)))))
        try:
            await asyncio.shield(paying)
        except asyncio.CancelledError:  # the payer is gone: a charge that comes yet is given back
            self._wall.keep(asyncio.create_task(self._undo(paying)))
            raise
        if self.exchange.answer is not None:
            raise PaymentDue
        if self._is_read and self.exchange.charged is not None:
            self._start_watch()

    def pay(self, price: Price) -> None:
        """Charge the request from a thread that serves a handler; raises `PaymentDue`."""
        if threading.get_ident() == self._thread:
            msg = "a priced handler that is no coroutine function must run on a thread: make it `async def`"
            raise RuntimeError(msg)
        asyncio.run_coroutine_threadsafe(self.pay_async(price), self._loop).result()

    async def _undo(self, paying: asyncio.Task[None]) -> None:
        await asyncio.wait([paying])
        await self._wall.link.drive(self.exchange.give_back())

    async def _read_body(self) -> str | None:
        """Read a body that is not too long, and keep it for the handler; return its digest."""
        while not self._is_read and self._size <= self._wall.body_bytes:
            message = await self._receive()
            self._note(message)
            self._waiting.append(message)
            if message["type"] == "http.disconnect":
                break
        return self._digest.hexdigest() if self._is_read else None

    # --- the application's two functions ---

    async def receive(self) -> Message:
        """Return the next message: those read for the digest first."""
        if self._waiting:
            return self._waiting.popleft()
        if self._is_read:
            await asyncio.shield(self._start_watch())
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._note(message)
        return message

    def _note(self, message: Message) -> None:
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self._digest.update(body)
            self._size += len(body)
            self._is_read = not message.get("more_body", False)

    def _start_watch(self) -> asyncio.Task[None]:
        if self._watch is None:
            self._watch = asyncio.create_task(self._until_gone())
        return self._watch

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def send(self, message: Message) -> None:
        """Pass the answer on: settle the price before its head, and note its first byte."""
        if self.exchange.answer is not None:
            return  # the payer gets the other answer
        if message["type"] == "http.response.start":
            self._has_begun = True
            if self._watch is not None and self._watch.done():
                await self._wall.link.drive(self.exchange.give_back())
            headers = [(name.decode("latin1"), value.decode("latin1")) for name, value in message.get("headers", ())]
            settled = await self._wall.link.drive(self.exchange.begin(message["status"], headers))
            assert isinstance(settled, list)
            message = {
                **message,
                "headers": [(name.encode("latin1"), value.encode("latin1")) for name, value in settled],
            }
            await self._send(message)
            return
        await self._send(message)
        is_body = message["type"] == "http.response.body"
        has_bytes = not is_body or message.get("body") or not message.get("more_body", False)
        if not self._has_left and has_bytes and message["type"] != "http.response.debug":
            self._has_left = True
            if self.exchange.charged is not None:
                self._wall.keep(asyncio.create_task(_ended(self._wall.link.drive(self.exchange.delivered()))))

    # --- the whole ---

    async def serve(self) -> None:
        """Run the application, and answer for it if the request is not paid."""
        token = current.set(self)
        try:
            if self._wall.price is not None:
                await self.pay_async(price_of(self._wall.price, self.exchange.request))
            await self._wall.app(self._scope, self.receive, self.send)
        except BaseException as error:
            if self.exchange.answer is None or not _is_due(error):
                raise
        finally:
            current.reset(token)
            if not self._has_left and self.exchange.charged is not None:
                # shielded: the server may have cancelled this task, because the payer is gone
                given = asyncio.create_task(_ended(self._wall.link.drive(self.exchange.give_back())))
                await asyncio.shield(self._wall.keep(given))
            if self._watch is not None:
                self._watch.cancel()
        if self.exchange.answer is not None and not self._has_begun:
            await self._answer(self.exchange.answer)

    async def _answer(self, ready: Ready) -> None:
        body = ready.body.encode()
        headers = [(name.lower().encode("latin1"), value.encode("latin1")) for name, value in ready.headers]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({"type": "http.response.start", "status": ready.status, "headers": headers})
        await self._send(
            {"type": "http.response.body", "body": b"" if self.exchange.request.method == "HEAD" else body}
        )


async def _ended(work: Awaitable[object]) -> None:
    await work


def _is_due(error: BaseException) -> bool:
    """Say whether an error is a `PaymentDue`, or a group of them: frameworks run handlers in groups of tasks."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_due(each) for each in error.exceptions)
    return isinstance(error, PaymentDue)


def _cleaned(scope: Any) -> dict[str, Any]:
    """Return a scope without payments and without headers that only the gateway may set."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if not is_private(name.decode("latin1").lower(), value.decode("latin1"))
    ]
    return {**scope, "headers": headers}


def _url(scope: Any, headers: list[tuple[str, str]], public_url: str) -> str:
    """Return the URL as the payer sees it."""
    raw = scope.get("raw_path")
    path = raw.decode("latin1") if raw else quote(scope["path"], safe="/:@!$&'()*+,;=~-._")
    query = scope.get("query_string", b"").decode("latin1")
    target = f"{path}?{query}" if query else path
    if public_url:
        return public_url + target
    host = next((value for name, value in headers if name.lower() == "host"), "")
    with contextlib.suppress(TypeError):
        host = host or "{}:{}".format(*scope["server"])
    return f"{scope.get('scheme', 'http')}://{host}{target}"
