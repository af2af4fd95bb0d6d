"""Paid tools on a server of the stock SDK: a middleware, and `paychan.sell.priced` on the tools.

server = MCPServer("maps", middleware=[PaidTools(merchant=".paychan/debug/merchant.sock")])

@server.tool()
@priced(25)  # satoshi
async def tile(z: int) -> str: ...
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, TextContent

from paychan.mcp import wire
from paychan.protocol.errors import PaychanError
from paychan.protocol.wire.merchant import Ready
from paychan.sell.exchange import Exchange, Rules
from paychan.sell.link import AsyncLink, Place
from paychan.sell.pricing import PaymentDue, current
from paychan.sell.requests import Price, Request

_BASE = "https://mcp.invalid/tool/"
"""Base of the URLs by which the server knows tools: its interface takes URLs of HTTP. Payers see `mcp://tool/…`."""

_PAYMENTS = (wire.X402_PAYMENT, wire.MPP_CREDENTIAL)


class PaidTools:
    """Middleware of `MCPServer` that charges for tools with a price. A tool that fails gives the price back.

    Args:
        merchant, token_file: where the server's merchant interface is; see `paychan.sell.link.Place`.
        realm: name of the service, for tools whose price names none.
        unpaid: answer to an unpaid call of a client that announces no payments: the result of x402, which has the challenges
            of MPP in its `_meta`, or the error of MPP.
        free_when_away: call tools for nothing while the paychan server is away; default: answer with an error.
    """

    def __init__(
        self,
        merchant: str | os.PathLike[str] | None = None,
        *,
        token_file: str | os.PathLike[str] | None = None,
        realm: str = "mcp",
        unpaid: Literal["x402", "mpp"] = "x402",
        free_when_away: bool = False,
    ) -> None:
        self.link = AsyncLink(Place(merchant, token_file))
        self.rules = Rules(lambda status: status >= 500, free_when_away)
        self.realm, self.unpaid = realm, unpaid
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method == "tools/call" and ctx.params is not None:
            return await self._call(ctx, ctx.params, call_next)
        result = await call_next(ctx)
        if ctx.method in ("initialize", "server/discover") and isinstance(result, dict):
            capabilities = result.setdefault("capabilities", {})
            capabilities["experimental"] = {**(capabilities.get("experimental") or {}), **wire.CAPABILITY}
        return result

    async def close(self) -> None:
        """Close the connections to the paychan server, after the messages under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.link.close()

    async def _call(
        self, ctx: ServerRequestContext[Any, Any], params: Mapping[str, Any], call_next: CallNext
    ) -> HandlerResult:
        meta = dict(params.get("_meta") or {})
        visit = _Visit(self, str(params.get("name", "")), params.get("arguments") or {}, _headers(meta))
        token = current.set(visit)
        try:
            result = await call_next(_without_payments(ctx, params, meta))
        except BaseException as error:
            if visit.exchange.answer is None or not _is_due(error):
                await asyncio.shield(self.keep(visit.undo()))
                raise
            brought = next((key for key in _PAYMENTS if key in meta), None)
            return self._refused(visit.tool, visit.exchange.answer, brought or self._convention(ctx))
        finally:
            current.reset(token)
        return await self._settled(visit.exchange, result)

    async def _settled(self, exchange: Exchange, result: HandlerResult) -> HandlerResult:
        if exchange.charged is None or not isinstance(result, dict):
            return result
        if result.get("isError"):
            await asyncio.shield(self.keep(self.link.drive(exchange.give_back())))
        else:
            await asyncio.shield(self.keep(self.link.drive(exchange.begin(200, []))))
            self.keep(self.link.drive(exchange.delivered()))
        return {**result, "_meta": {**(result.get("_meta") or {}), **wire.receipt_meta(exchange.charged.headers)}}

    def keep(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Send messages to the end. Await the task by `shield`: the call may be cancelled meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _convention(self, ctx: ServerRequestContext[Any, Any]) -> str:
        """Return the key of the convention in which an unpaid call is answered."""
        known = ctx.session.client_capabilities
        announced = known.experimental if known is not None else None
        takes_mpp = isinstance(announced, Mapping) and "payment" in announced
        return wire.MPP_CREDENTIAL if takes_mpp or self.unpaid == "mpp" else wire.X402_PAYMENT

    def _refused(self, tool: str, ready: Ready, convention: str) -> CallToolResult:
        """Return the answer to a call that was not charged, or raise it."""
        try:
            problem = json.loads(ready.body)
        except ValueError:
            problem = {}
        detail = str(problem.get("detail") or "the call was not charged")
        if ready.status == 200:  # the payer has closed its channel
            return CallToolResult(content=[TextContent(type="text", text=ready.body)], structured_content=problem)
        if ready.status != 402:
            code = wire.INVALID_PARAMS if ready.status == 400 else wire.INTERNAL_ERROR
            raise MCPError(code, detail, {"httpStatus": ready.status, "problem": problem})
        data = {"httpStatus": 402, "challenges": wire.challenges_json(ready.headers), "problem": problem}
        required = wire.required_json(ready.headers, tool)
        if convention == wire.X402_PAYMENT and required is not None:
            return CallToolResult(
                content=[TextContent(type="text", text=json.dumps(required))],
                structured_content=required,
                is_error=True,
                _meta={wire.MPP_REQUIRED: data},
            )
        if "code" not in problem:
            raise MCPError(wire.PAYMENT_REQUIRED, "Payment Required", data)
        failure = {"reason": problem["code"], "detail": detail}
        raise MCPError(wire.VERIFICATION_FAILED, "Payment Verification Failed", {**data, "failure": failure})


class _Visit:
    """One call of a tool, as `priced` and `charge` see it."""

    def __init__(self, tools: PaidTools, tool: str, arguments: Mapping[str, Any], headers: wire.Headers) -> None:
        self._tools, self.tool = tools, tool
        self._digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
        self.exchange = Exchange(tools.rules, Request("POST", _BASE + quote(tool), {}), headers)
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._paying: asyncio.Task[object] | None = None

    async def pay_async(self, price: Price) -> None:
        """Charge the call; raises `PaymentDue`."""
        price = msgspec.structs.replace(price, realm=price.realm or self._tools.realm)
        digest = self._digest if self.exchange.brings_payment else None
        self._paying = self._tools.keep(self._tools.link.drive(self.exchange.pay(price, digest)))
        await asyncio.shield(self._paying)
        if self.exchange.answer is not None:
            raise PaymentDue

    def pay(self, price: Price) -> None:
        """Charge the call from the thread of a tool; raises `PaymentDue`."""
        if threading.get_ident() == self._thread:
            msg = "a priced tool that is no coroutine function must run on a thread: make it `async def`"
            raise RuntimeError(msg)
        asyncio.run_coroutine_threadsafe(self.pay_async(price), self._loop).result()

    async def undo(self) -> None:
        """Give the price back, also one whose charge is still under way."""
        if self._paying is not None:
            await asyncio.wait([self._paying])
        await self._tools.link.drive(self.exchange.give_back())


def _headers(meta: Mapping[str, Any]) -> wire.Headers:
    try:
        return wire.payment_headers(meta)
    except PaychanError as error:
        data = {"httpStatus": 402, "detail": str(error)}
        raise MCPError(wire.INVALID_PARAMS, "Invalid params", data) from None


def _without_payments(
    ctx: ServerRequestContext[Any, Any], params: Mapping[str, Any], meta: Mapping[str, Any]
) -> ServerRequestContext[Any, Any]:
    """Return the call as the tool may see it."""
    if not any(key in meta for key in _PAYMENTS):
        return ctx
    kept = {key: value for key, value in meta.items() if key not in _PAYMENTS}
    seen = {key: value for key, value in (ctx.meta or {}).items() if key not in _PAYMENTS}
    return replace(ctx, params={**params, "_meta": kept}, meta=seen)  # type: ignore[arg-type] # an open map


def _is_due(error: BaseException) -> bool:
    """Say whether an error is a `PaymentDue`, or a group of them."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_due(each) for each in error.exceptions)
    return isinstance(error, PaymentDue)
