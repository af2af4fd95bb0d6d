"""A client of MCP that pays for tools over channels of the payer's wallet, and within its budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import quote, urlsplit

from mcp.shared.exceptions import MCPError

from paychan.client.paying.budget import Budget, host_of
from paychan.client.paying.demands import Headers
from paychan.client.paying.drive import drive_async
from paychan.client.paying.exchange import Answer, Bill, Purse, exchange
from paychan.client.paying.paying import Request
from paychan.mcp import wire

UNKNOWN_HOST = "unknown:0"
"""Host of a server without a URL, such as one behind standard input. A budget with `hosts` does not pay it."""

_PAYMENTS = (wire.X402_PAYMENT, wire.MPP_CREDENTIAL)


class PaidSession:
    """A session or client of the SDK whose `call_tool` pays; everything else is that of the session.

    Args:
        session: `ClientSession` or `Client` of the SDK.
        budget: limits of the wallet; or a `Purse`, which may open channels and prefers a protocol.
        server: URL of the server, by whose host the budget counts; "": the server has none.
    """

    def __init__(self, session: Any, budget: Budget | Purse, *, server: str = "") -> None:
        self._session = session
        self._purse = budget if isinstance(budget, Purse) else Purse(budget)
        parts = urlsplit(server)
        self._host = host_of(parts.scheme, parts.hostname or "", parts.port) if server else UNKNOWN_HOST
        self.bill: Bill | None = None
        """Bill of the newest paid call that has ended."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Call a tool, and pay for it if the server wants that.

        The result is the tool's; one that no payment of this library can pay is returned or raised as it came. `options`
        are those of the session's `call_tool`.

        Raises:
            ClientError: as `exchange`; nothing is paid twice for the same tool and arguments while no answer came.
            MCPError: an error of the server.
        """
        given = dict(meta or {})
        if any(key in given for key in _PAYMENTS):
            return await self._session.call_tool(name, arguments, meta=given, **options)

        async def send(headers: Headers) -> tuple[Any, Answer]:
            try:
                sent = {**given, **wire.payment_meta(headers)} or None
                result = await self._session.call_tool(name, arguments, meta=sent, **options)
            except MCPError as error:
                refused = _refused(error)
                if refused is None:
                    raise
                return error, refused
            return result, _answer(result)

        outcome, bill = await drive_async(exchange(self._purse, self._request(name, arguments)), send, _drop)
        if bill is not None:
            self.bill = bill
        if isinstance(outcome, MCPError):
            raise outcome
        return outcome

    def _request(self, name: str, arguments: dict[str, Any] | None) -> Request:
        body = json.dumps(arguments or {}, sort_keys=True, default=str).encode()
        return Request(
            "tools/call", f"mcp://{self._host}/tool/{quote(name)}", self._host, frozenset(), sha256(body).digest()
        )


async def _drop(_: Any) -> None:
    """Leave a result: nothing is open."""


def _refused(error: MCPError) -> Answer | None:
    """Return an error of MPP as a 402; None for another error."""
    data = error.data
    if error.code not in (wire.PAYMENT_REQUIRED, wire.VERIFICATION_FAILED) or not isinstance(data, dict):
        return None
    headers = wire.offer_headers(None, data.get("challenges"))
    if not headers:
        return None
    problem, failure = data.get("problem"), data.get("failure")
    reason: dict[str, Any] = {}
    if isinstance(failure, dict):
        reason = {"code": failure.get("reason"), "detail": failure.get("detail")}
    return Answer(402, headers, json.dumps({**reason, **(problem if isinstance(problem, dict) else {})}).encode())


def _answer(result: Any) -> Answer:
    """Return a result as an answer: 402 for a price, 502 for an error without a receipt, else 200."""
    meta = result.meta or {}
    required = result.structured_content if result.is_error else None
    shown = meta.get(wire.MPP_REQUIRED)
    other = shown if isinstance(shown, dict) else {}
    headers = wire.offer_headers(required, other.get("challenges")) if result.is_error else ()
    if headers:
        problem = other.get("problem")
        return Answer(402, headers, json.dumps(problem if isinstance(problem, dict) else {}).encode())
    receipts = wire.receipt_headers(meta)
    return Answer(200 if receipts or not result.is_error else 502, receipts)
