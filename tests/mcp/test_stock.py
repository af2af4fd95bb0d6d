"""The stock SDKs' own clients and types of MCP, against our tools: x402's client pays, pympp's types read MPP's members."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from paychan.client import Purse
from paychan.sell import priced

if TYPE_CHECKING:
    from mcp import Client
    from mcp.server.mcpserver import MCPServer

    from paychan.mcp import PaidTools


@pytest.fixture
async def tools(merchant: Path) -> AsyncIterator[PaidTools]:
    from paychan.mcp import PaidTools

    paid = PaidTools(merchant)
    yield paid
    await paid.close()


def server_of(tools: PaidTools) -> MCPServer:
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("maps", middleware=[tools])

    @server.tool()
    @priced(25)
    async def tile(z: int) -> str:
        return f"tile {z}"

    return server


class Plain:
    """The SDK's client as x402's wrapper calls one: parameters and results have the names of the wire."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def call_tool(self, params: dict[str, Any], **_: Any) -> Any:
        result = await self._client.call_tool(params["name"], params["arguments"], meta=params.get("_meta"))
        return SimpleNamespace(**result.model_dump(mode="json", by_alias=True))


async def test_x402s_client_pays(tools: PaidTools, purse: Purse) -> None:
    """Unmodified `x402MCPClient` reads our result, pays it by our scheme, and reads our receipt."""
    from mcp import Client
    from x402 import x402Client
    from x402.mcp import x402MCPClient

    from paychan.x402 import pay_with

    paying = x402Client()
    pay_with(paying, purse, max_sat=50)
    async with Client(server_of(tools)) as client:
        answer = await x402MCPClient(Plain(client), paying).call_tool("tile", {"z": 3})
    assert (answer.payment_made, answer.is_error, answer.payment_response.success) == (True, False, True)
    assert answer.content[0]["text"] == "tile 3"
    assert purse.log.account().total_sat == 25


async def test_pympps_types_read_our_members(tools: PaidTools, purse: Purse) -> None:
    """Challenge, credential and receipt go through pympp's types for MCP, and come out the same."""
    from mcp import Client
    from mcp.shared.exceptions import MCPError
    from mpp import Credential
    from mpp.extensions.mcp.types import MCPChallenge, MCPCredential, MCPReceipt

    from paychan.mcp import PaidSession, wire

    tools.unpaid, purse.prefer = "mpp", "mpp"
    sent: list[dict[str, Any]] = []
    async with Client(server_of(tools)) as client:
        with pytest.raises(MCPError) as caught:
            await client.call_tool("tile", {"z": 3})
        paying = PaidSession(client, purse)
        call = client.call_tool

        async def spy(name: str, arguments: Any, *, meta: Any = None) -> Any:
            sent.append(meta or {})
            return await call(name, arguments, meta=meta)

        client.call_tool = spy  # type: ignore[method-assign, assignment]
        result = await paying.call_tool("tile", {"z": 3})
    (shown,) = caught.value.data["challenges"]
    assert MCPChallenge.from_dict(shown).to_dict() == shown
    credential = MCPCredential.from_meta(sent[-1])
    assert credential is not None
    assert credential.to_meta()[wire.MPP_CREDENTIAL] == sent[-1][wire.MPP_CREDENTIAL]
    core = Credential.from_authorization(credential.to_core().to_authorization())
    assert wire.payment_headers(sent[-1])[0][0] == "authorization"
    assert core.payload["action"] == "voucher"
    receipt = MCPReceipt.from_meta(result.meta)
    assert receipt is not None
    assert (receipt.challenge_id, receipt.method, receipt.extensions["charged"]) == (core.challenge.id, "bitcoin", "25")
