"""Real clients and servers of the stock SDK; tools are paid over real channels, by both conventions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from paychan.client import Budget, Purse, errors
from paychan.mcp import wire
from paychan.protocol.wire.mpp_outcomes import PROBLEMS
from paychan.protocol.wire.x402_json import read_response
from paychan.protocol.wire.x402_outcomes import read_settled
from paychan.sell import charge, priced

if TYPE_CHECKING:
    from paychan.mcp import PaidSession


class Shop:
    """A server of MCP with tools, in this process. `calls` are the calls that reached a tool."""

    def __init__(self, merchant: Path) -> None:
        from mcp.server.mcpserver import MCPServer

        from paychan.mcp import PaidTools

        self.calls: list[Any] = []
        self.started = asyncio.Event()
        self.tools = PaidTools(merchant)
        self.server = MCPServer("maps", middleware=[self.tools])
        shop = self

        @self.server.tool()
        async def free() -> str:
            return "free"

        @self.server.tool()
        @priced(25, description="one map tile")
        async def tile(z: int) -> str:
            shop.calls.append(z)
            return f"tile {z}"

        @self.server.tool()
        @priced(25)
        def blocking(z: int) -> dict[str, int]:
            shop.calls.append(z)
            return {"z": z}

        @self.server.tool()
        @priced(25)
        async def broken(z: int) -> str:
            shop.calls.append(z)
            msg = "out of order"
            raise ValueError(msg)

        @self.server.tool()
        @priced(25)
        async def slow(z: int) -> str:
            shop.calls.append(z)
            shop.started.set()
            await asyncio.Event().wait()
            return "never"

        @self.server.tool()
        @priced(ceiling=40)
        async def words(n: int) -> str:
            charge(n)
            return "word " * n


@pytest.fixture
async def shop(merchant: Path) -> AsyncIterator[Shop]:
    opened = Shop(merchant)
    yield opened
    await opened.tools.close()


@pytest.fixture(params=["legacy", "auto"])
def mode(request: pytest.FixtureRequest) -> str:
    """The handshake of earlier versions, over streams; and the present protocol, in the process."""
    name: str = request.param
    return name


@asynccontextmanager
async def session(shop: Shop, purse: Purse, mode: str = "auto") -> AsyncIterator[PaidSession]:
    from mcp import Client

    from paychan.mcp import PaidSession

    async with Client(shop.server, mode=mode) as client:
        yield PaidSession(client, purse)


def text(result: Any) -> str:
    found: str = result.content[0].text
    return found


def paid_sat(purse: Purse) -> int:
    record = purse.wallet.read(purse.wallet.names()[0])
    return record.paid_sat - record.open_price_sat


@pytest.mark.parametrize("prefer", ["x402", "mpp"])
async def test_a_tool_is_paid(shop: Shop, purse: Purse, mode: str, prefer: str) -> None:
    """An offer of both conventions is answered by the one that the payer prefers; the result has its receipt."""
    purse.prefer = prefer  # type: ignore[assignment]
    async with session(shop, purse, mode) as paying:
        assert text(await paying.call_tool("free")) == "free"
        results = [await paying.call_tool("tile", {"z": z}) for z in (3, 4)]
        assert paying.bill is not None
        assert (paying.bill.charged_sat, paying.bill.signed_sat) == (25, 25)

    assert [text(result) for result in results] == ["tile 3", "tile 4"]
    key = wire.X402_RESPONSE if prefer == "x402" else wire.MPP_RECEIPT
    assert [key in result.meta for result in results] == [True, True]
    assert shop.calls == [3, 4]
    assert paid_sat(purse) == purse.log.account().total_sat == 50


async def test_an_unpaid_call_shows_both_offers(shop: Shop, mode: str) -> None:
    """A client that pays nothing gets the result of x402, with the challenges of MPP beside it; no tool runs."""
    from mcp import Client

    async with Client(shop.server, mode=mode) as client:
        result = await client.call_tool("tile", {"z": 3})
    required = result.structured_content
    assert result.is_error
    assert (required["x402Version"], required["accepts"][0]["amount"]) == (2, "25")
    assert required["resource"]["url"] == "mcp://tool/tile"
    shown = result.meta[wire.MPP_REQUIRED]
    assert (shown["httpStatus"], shown["problem"]["type"]) == (402, PROBLEMS + "payment-required")
    (challenge,) = shown["challenges"]
    assert (challenge["method"], challenge["intent"], challenge["request"]["amount"]) == ("bitcoin", "session", "25")
    assert shop.calls == []


async def test_mpps_error_is_paid(shop: Shop, purse: Purse) -> None:
    """A server of MPP's convention answers with -32042, and the same client pays it."""
    from mcp.shared.exceptions import MCPError

    shop.tools.unpaid = "mpp"
    async with session(shop, purse) as paying:
        with pytest.raises(MCPError) as caught:
            await paying._session.call_tool("tile", {"z": 3})
        assert caught.value.code == wire.PAYMENT_REQUIRED
        assert text(await paying.call_tool("tile", {"z": 3})) == "tile 3"
    assert paid_sat(purse) == 25


async def test_the_server_announces_what_it_takes(shop: Shop, mode: str) -> None:
    """The capabilities name method and intent of MPP."""
    from mcp import Client

    async with Client(shop.server, mode=mode) as client:
        assert client.server_capabilities.experimental["payment"] == {"methods": {"bitcoin": {"intents": ["session"]}}}


async def test_a_tool_on_a_thread_is_paid(shop: Shop, purse: Purse) -> None:
    """A tool that is no coroutine function has a price, too; its structured result stays whole."""
    async with session(shop, purse) as paying:
        assert (await paying.call_tool("blocking", {"z": 7})).structured_content == {"z": 7}
    assert (shop.calls, paid_sat(purse)) == ([7], 25)


async def test_a_tool_that_fails_gives_the_price_back(shop: Shop, purse: Purse) -> None:
    """The price is credit: the next call signs nothing more."""
    async with session(shop, purse) as paying:
        assert (await paying.call_tool("broken", {"z": 1})).is_error
        assert (paying.bill.charged_sat, paying.bill.signed_sat) == (0, 25)
        assert text(await paying.call_tool("tile", {"z": 1})) == "tile 1"
        assert (paying.bill.charged_sat, paying.bill.signed_sat) == (25, 0)
    assert paid_sat(purse) == 25


async def test_a_cancelled_call_gives_the_price_back(shop: Shop, purse: Purse, mode: str) -> None:
    """The price of a call that the client gives up is credit, which the next receipt shows."""
    async with session(shop, purse, mode) as paying:
        await paying.call_tool("tile", {"z": 0})
        call = asyncio.create_task(paying.call_tool("slow", {"z": 1}))
        await shop.started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await shop.tools.close()
        await paying.call_tool("tile", {"z": 2})
        assert read_settled(read_response(paying.bill.receipt)).state.credit_sat == 25
    assert paid_sat(purse) == 75


async def test_wrong_arguments_cost_nothing(shop: Shop, purse: Purse) -> None:
    """The SDK checks arguments before the price is asked for."""
    async with session(shop, purse) as paying:
        assert (await paying.call_tool("tile", {"z": "no number"})).is_error
    assert purse.wallet.names() == []


async def test_a_tool_says_what_it_costs(shop: Shop, purse: Purse) -> None:
    """The ceiling is signed, the real cost is charged, and the rest is credit."""
    async with session(shop, purse) as paying:
        await paying.call_tool("words", {"n": 10})
        assert (paying.bill.charged_sat, paying.bill.signed_sat) == (10, 40)


async def test_calls_at_once_are_paid_each(shop: Shop, purse: Purse) -> None:
    """Eight calls over one channel wait for each other and cost eight prices."""
    async with session(shop, purse) as paying:
        await paying.call_tool("tile", {"z": 0})
        results = await asyncio.gather(*(paying.call_tool("tile", {"z": z}) for z in range(1, 9)))
    assert {result.is_error for result in results} == {False}
    assert paid_sat(purse) == 9 * 25


async def test_the_budget_declines(shop: Shop, purse: Purse) -> None:
    """A price above the budget is declined before anything is signed; a server without a URL is no named host."""
    for budget, kind in (
        (Budget(per_request=24), errors.OverBudget),
        (Budget(total=99, hosts=["a.example"]), errors.HostNotAllowed),
    ):
        async with session(shop, Purse(budget, purse.wallet.directory)) as paying:
            with pytest.raises(kind):
                await paying.call_tool("tile", {"z": 3})
    assert shop.calls == []


@pytest.mark.parametrize(
    ("meta", "code"),
    [
        ({wire.MPP_CREDENTIAL: "text"}, wire.INVALID_PARAMS),
        ({wire.MPP_CREDENTIAL: {"challenge": {}, "payload": {}}}, wire.INVALID_PARAMS),
        ({wire.X402_PAYMENT: [1]}, wire.INVALID_PARAMS),
        ({wire.X402_PAYMENT: {"x402Version": 2}, wire.MPP_CREDENTIAL: {}}, wire.INVALID_PARAMS),
    ],
)
async def test_a_payment_that_can_not_be_read(shop: Shop, meta: dict[str, Any], code: int) -> None:
    """The call is answered with an error of its form, and no tool runs."""
    from mcp import Client
    from mcp.shared.exceptions import MCPError

    async with Client(shop.server) as client:
        with pytest.raises(MCPError) as caught:
            await client.call_tool("tile", {"z": 3}, meta=meta)
    assert caught.value.code == code
    assert shop.calls == []


async def test_a_challenge_of_another_price_is_refused(shop: Shop, purse: Purse) -> None:
    """A credential for one tool's price does not pay another's: -32043 with a fresh challenge, and nothing is charged."""
    from mcp.shared.exceptions import MCPError

    purse.prefer = "mpp"
    async with session(shop, purse) as paying:
        sent: list[dict[str, Any]] = []
        call = paying._session.call_tool

        async def spy(name: str, arguments: Any, *, meta: Any = None) -> Any:
            sent.append(meta or {})
            return await call(name, arguments, meta=meta)

        paying._session.call_tool = spy
        await paying.call_tool("tile", {"z": 3})
        with pytest.raises(MCPError) as caught:
            await call("words", {"n": 1}, meta=sent[-1])
    assert caught.value.code == wire.VERIFICATION_FAILED
    assert caught.value.data["failure"]["reason"] == "offer_mismatch"
    assert caught.value.data["challenges"][0]["request"]["amount"] == "40"


async def test_a_wallet_that_is_behind_catches_up(shop: Shop, purse: Purse) -> None:
    """The correction comes in the answer, with the newest payment as proof, in both conventions."""
    from paychan.mcp import PaidSession

    async with session(shop, purse) as paying:
        await paying.call_tool("tile", {"z": 0})
        for prefer in ("x402", "mpp"):
            old = purse.wallet.read(purse.wallet.names()[0])
            for z in (1, 2):
                await paying.call_tool("tile", {"z": z})
            file = purse.wallet.lock(old.name)
            file.save(old)
            file.release()
            purse.log.path.unlink()
            behind = PaidSession(paying._session, Purse(Budget(total=1000), purse.wallet.directory, prefer=prefer))
            assert text(await behind.call_tool("tile", {"z": 3})) == "tile 3"
    assert paid_sat(purse) == 7 * 25
