"""The stock server of pympp sells by the plug-in, over real channels; `paid_async_client` and the SDK's client pay it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from paychan.client import Budget, Purse, paid_async_client
from paychan.protocol.wire.mpp_outcomes import read_receipt
from tests.lib.system import System

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse

SECRET = "secret of the SDK's challenges"


class Shop:
    """A program of Starlette with prices by the SDK. `calls` are the requests that reached an endpoint."""

    def __init__(self, system: System) -> None:
        from mpp.server import pay as sdk_pay
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse
        from starlette.routing import Route

        from paychan.mpp import ChannelSales

        self.calls: list[str] = []
        self.sales = ChannelSales(system.state / "merchant.sock", realm="shop.example", secret_key=SECRET)
        engine = self.sales.engine()

        @self.sales.pay(engine.session(amount="25"))
        async def tile(request: Request, credential: Any, receipt: Any) -> PlainTextResponse:
            self.calls.append(f"{request.url.path} {receipt.extensions['charged']}")
            return PlainTextResponse("goods")

        @self.sales.pay(engine.session(amount="25"))
        async def broken(request: Request, credential: Any, receipt: Any) -> PlainTextResponse:
            return PlainTextResponse("out of order", 503)

        @sdk_pay(engine.session(amount="25"))
        async def plain(request: Request, credential: Any, receipt: Any) -> PlainTextResponse:
            return PlainTextResponse("plain")

        routes = [Route("/broken", broken), Route("/plain", plain), Route("/{name}", tile, methods=["GET", "POST"])]
        self.app = Starlette(routes=routes)

    @property
    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self.app)


@pytest.fixture
async def shop(system: System) -> AsyncIterator[Shop]:
    opened = Shop(system)
    yield opened
    await opened.sales.close()


def payers(shop: Shop, purse: Purse) -> tuple[httpx.AsyncClient, httpx.AsyncClient]:
    """Our own client, and that of the SDK with our plug-in."""
    from paychan.mpp import pay_with

    own = paid_async_client(purse, transport=shop.transport, base_url="http://shop.example")
    return own, httpx.AsyncClient(transport=pay_with(purse, inner=shop.transport), base_url="http://shop.example")


def paid_sat(purse: Purse) -> int:
    record = purse.wallet.read(purse.wallet.names()[0])
    return record.paid_sat - record.open_price_sat


async def test_an_unpaid_request_gets_the_servers_terms(shop: Shop, system: System) -> None:
    """The SDK's challenge has its own id, and identity key, URL and limits of the paychan server."""
    from mpp import Challenge

    async with httpx.AsyncClient(transport=shop.transport, base_url="http://shop.example") as client:
        answer = await client.get("/a")
    challenge = Challenge.from_www_authenticate(answer.headers["WWW-Authenticate"])
    assert (answer.status_code, challenge.method, challenge.intent) == (402, "bitcoin", "session")
    assert (challenge.request["amount"], challenge.request["methodDetails"]["payUrl"]) == ("25", system.url)
    assert challenge.verify(SECRET, "shop.example")
    assert shop.calls == []


async def test_both_clients_pay_the_sdks_server(shop: Shop, purse: Purse) -> None:
    """Each request is charged once, and has a receipt of its challenge; a body is not read before the payment."""
    for client in payers(shop, purse):
        async with client:
            answers = [await client.get("/a"), await client.get("/b"), await client.post("/c", content=b"abc")]
        assert [(answer.status_code, answer.text) for answer in answers] == [(200, "goods")] * 3
        assert [answer.extensions["paychan"].charged_sat for answer in answers] == [25] * 3
        assert read_receipt(answers[0].headers["Payment-Receipt"]).settled.charged_sat == 25
    assert shop.calls == ["/a 25", "/b 25", "/c 25"] * 2
    assert paid_sat(purse) == purse.log.account().total_sat == 150


async def test_an_endpoint_that_fails_gives_the_price_back(shop: Shop, purse: Purse) -> None:
    """The answer's receipt says that nothing was charged: the next request signs nothing more."""
    for client in payers(shop, purse):
        async with client:
            before_sat = 0 if not purse.wallet.names() else paid_sat(purse)
            answer = await client.get("/broken")
            assert (answer.status_code, read_receipt(answer.headers["Payment-Receipt"]).settled.charged_sat) == (503, 0)
            assert (await client.get("/a")).extensions["paychan"].signed_sat == 0
        assert paid_sat(purse) - before_sat == 25


async def test_the_sdks_own_decorator_sells_too(shop: Shop, purse: Purse) -> None:
    """A charge is final before the endpoint runs; the same request again is another one."""
    own, _ = payers(shop, purse)
    async with own:
        assert [(await own.get("/plain")).text for _ in range(2)] == ["plain"] * 2
    assert paid_sat(purse) == 50


@pytest.mark.parametrize("which", [0, 1])
async def test_a_wallet_that_is_behind_catches_up(shop: Shop, purse: Purse, which: int) -> None:
    """The SDK's 402 carries the channel's state, signed by the SDK's secret, and the second try is charged."""
    own, _ = payers(shop, purse)
    async with own:
        await own.get("/0")
        old = purse.wallet.read(purse.wallet.names()[0])
        for number in (1, 2):
            await own.get(f"/{number}")
    file = purse.wallet.lock(old.name)
    file.save(old)
    file.release()
    purse.log.path.unlink()
    client = payers(shop, Purse(Budget(total=1000), purse.wallet.directory))[which]
    async with client:
        assert (await client.get("/after")).text == "goods"
    assert paid_sat(purse) == 100


async def test_a_credential_pays_one_request(shop: Shop, purse: Purse) -> None:
    """Twenty thieves at once get nothing for a used credential; with the key of its request, the few repetitions of one."""
    from paychan.mpp import pay_with

    sent: list[dict[str, str]] = []
    spy = pay_with(purse, inner=shop.transport)

    def note(event: Any) -> None:
        authorization, key = event["credential"].to_authorization(), event["request"].headers["Idempotency-Key"]
        sent.append({"Authorization": authorization, "Idempotency-Key": key})

    spy.on_credential_created(note)
    async with httpx.AsyncClient(transport=spy, base_url="http://shop.example") as client:
        assert (await client.get("/bought")).status_code == 200
    without_key = {"Authorization": sent[0]["Authorization"]}
    calls = len(shop.calls)
    async with httpx.AsyncClient(transport=shop.transport, base_url="http://shop.example") as thief:

        async def steal(headers: dict[str, str], query: str = "") -> list[httpx.Response]:
            return await asyncio.gather(*(thief.get(f"/bought{query}", headers=headers) for _ in range(20)))

        elsewhere, again, repeated = await steal(sent[0], "?n=1"), await steal(without_key), await steal(sent[0])
    assert {answer.status_code for answer in (*elsewhere, *again)} == {402}
    assert {answer.json()["code"] for answer in again} == {"credit_too_low"}
    served = [answer.status_code for answer in repeated].count(200)
    assert served == len(shop.calls) - calls
    assert served <= 2
    assert paid_sat(purse) == 25
