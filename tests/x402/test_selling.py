"""The unmodified SDK on both sides: its httpx client with our scheme, its FastAPI middleware with our facilitator."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from paychan.client import Payer, paid_async_client
from paychan.protocol.wire.x402_json import read_required, read_response
from paychan.protocol.wire.x402_outcomes import read_settled
from tests.gateway.shop import Shop
from tests.lib.ports import free_port
from tests.lib.readme import ROOT
from tests.x402.market import PRICE_SAT, Customer, Market, open_server, purse_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shop, int]]:
    with open_server(tmp_path_factory.mktemp("market")) as opened:
        yield opened


@pytest.fixture
async def market(server: tuple[Shop, int]) -> AsyncIterator[Market]:
    found = Market(*server)
    yield found
    await found.seller.aclose()


async def test_the_first_and_the_second_request_are_paid(market: Market, tmp_path: Path) -> None:
    """The middleware's offer has our terms and the flow `upfront`; the wallet opens one channel and pays both requests."""
    purse = purse_of(tmp_path)
    async with market.client() as stranger:
        offer = read_required((await stranger.get("/tile/1")).headers["PAYMENT-REQUIRED"]).accepts[0]
    assert (offer.amount, offer.pay_to, offer.extra["paymentFlow"]) == ("25", market.seller.identity, "upfront")
    async with market.paying(purse) as client:
        answers = [await client.get(f"/tile/{number}") for number in ("a", "b")]

    assert [answer.json() for answer in answers] == [{"tile": "a"}, {"tile": "b"}]
    settled = [read_settled(read_response(answer.headers["PAYMENT-RESPONSE"])) for answer in answers]
    assert [each.charged_sat for each in settled] == [PRICE_SAT] * 2
    assert (settled[1].state.accepted_sat, settled[1].state.credit_sat) == (settled[0].state.accepted_sat + 25, 0)
    assert (purse.log.account().total_sat, len(purse.wallet.names())) == (50, 1)


async def test_a_payer_that_is_behind_recovers_by_the_state_in_the_refusal(market: Market, tmp_path: Path) -> None:
    """The middleware answers a failed settlement without an offer; the state in PAYMENT-RESPONSE corrects the wallet."""
    purse = purse_of(tmp_path)
    async with market.paying(purse) as client:
        await client.get("/tile/a")
        (name,) = purse.wallet.names()
        before = purse.wallet.read(name), purse.log.path.read_bytes()
        for number in ("b", "c"):
            await client.get(f"/tile/{number}")
    file, _ = purse.wallet.open(name)
    file.save(before[0])
    file.release()
    purse.log.path.write_bytes(before[1])

    async with market.paying(purse_of(tmp_path)) as client:
        answer = await client.get("/tile/d")
    assert (answer.status_code, answer.json()) == (200, {"tile": "d"})
    settled = read_settled(read_response(answer.headers["PAYMENT-RESPONSE"]))
    assert (settled.charged_sat, settled.state.credit_sat) == (25, 0)


async def test_twenty_requests_at_once_are_answered_as_many_times_as_was_paid(market: Market) -> None:
    """Payments of seven prices together: seven answers, whatever the order. None is free, none is charged twice."""
    customer = Customer(market)
    paid = 7 * PRICE_SAT
    headers = [await customer.header(paid, f"/tile/at-once-{number}") for number in range(20)]
    async with market.client() as http:
        answers = await asyncio.gather(
            *(http.get(f"/tile/at-once-{number}", headers=header) for number, header in enumerate(headers))
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [402] * 13
    assert len([each for each in market.served if each.startswith("at-once-")]) == 7
    refused = [read_response(each.headers["PAYMENT-RESPONSE"]) for each in answers if each.status_code == 402]
    assert {each.error_reason for each in refused} == {"insufficient_funds"}


@pytest.mark.parametrize("name", ["", "identifier-of-20-bytes"])
async def test_one_payment_twenty_times_at_once_is_answered_once(market: Market, name: str) -> None:
    """The same payment for the same request, with or without a payment-identifier, is settled once."""
    customer = Customer(market)
    path = f"/tile/same{name}"
    header = await customer.header(PRICE_SAT, path, name)
    async with market.client() as http:
        answers = await asyncio.gather(*(http.get(path, headers=header) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] + [402] * 19
    assert market.served.count(f"same{name}") == 1
    refused = [read_response(each.headers["PAYMENT-RESPONSE"]) for each in answers if each.status_code == 402]
    assert {each.error_reason for each in refused} == {"invalid_batch_settlement_bitcoin_channel_busy"}
    other = await customer.header(PRICE_SAT, "/tile/other", name)
    async with market.client() as http:
        assert (await http.get("/tile/other", headers=other)).status_code == 402


async def test_a_failed_handler_makes_the_price_credit(market: Market) -> None:
    """The payer paid upfront, and nothing was delivered: the same change value pays the next request."""
    customer = Customer(market)
    async with market.client() as http:
        failed = await http.get("/fails/503", headers=await customer.header(PRICE_SAT, "/fails/503"))
        assert failed.status_code == 503
        answer = await http.get("/tile/credit", headers=await customer.header(PRICE_SAT, "/tile/credit"))
        assert answer.status_code == 200
        assert read_settled(read_response(answer.headers["PAYMENT-RESPONSE"])).state.credit_sat == 0

        missing = await http.get("/fails/404", headers=await customer.header(2 * PRICE_SAT, "/fails/404"))
        assert missing.status_code == 404
        again = await http.get("/tile/unpaid", headers=await customer.header(2 * PRICE_SAT, "/tile/unpaid"))
        assert again.status_code == 402


class Lossy(httpx.AsyncHTTPTransport):
    """Loses the answers to the paid requests that a test names."""

    losses = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if "PAYMENT-SIGNATURE" in request.headers and self.losses:
            self.losses -= 1
            await response.aclose()
            msg = "lost"
            raise httpx.ReadError(msg)
        return response


async def test_the_sdk_pays_the_gateway(market: Market, tmp_path: Path) -> None:
    """First payment, second one, a lost answer, and recovery of a wallet that is behind; the service works once for each."""
    from x402 import x402Client
    from x402.http.clients.httpx import PaymentError, x402AsyncTransport

    from paychan.x402 import pay_with

    purse, lossy = purse_of(tmp_path), Lossy()
    base, calls = market.shop.url, len(market.shop.upstream.calls)
    transport = x402AsyncTransport(pay_with(x402Client(), purse, max_sat=100), lossy)
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        assert (await client.get("/v1/a?z=3")).json()["path"] == "/v1/a?z=3"
        (name,) = purse.wallet.names()
        before = purse.wallet.read(name), purse.log.path.read_bytes()
        lossy.losses = 1
        with pytest.raises(PaymentError):
            await client.get("/v1/b")
        assert (await client.get("/v1/b")).status_code == 200
        assert (await client.get("/v1/c")).status_code == 200
    assert len(market.shop.upstream.calls) - calls == 3
    assert purse.log.account().total_sat == 3 * PRICE_SAT

    file, _ = purse.wallet.open(name)
    file.save(before[0])
    file.release()
    purse.log.path.write_bytes(before[1])
    behind = pay_with(x402Client(), purse_of(tmp_path), max_sat=100)
    async with httpx.AsyncClient(transport=x402AsyncTransport(behind), base_url=base) as client:
        answer = await client.get("/v1/d")
    assert answer.status_code == 200
    assert read_settled(read_response(answer.headers["PAYMENT-RESPONSE"])).state.credit_sat == 0


async def test_our_own_client_pays_the_stock_middleware(market: Market, tmp_path: Path) -> None:
    """`paid_async_client` understands its offers, and its refusals, which have the channel's state and no offer."""
    purse = purse_of(tmp_path)
    async with paid_async_client(purse, transport=market.transport, base_url="http://shop.example") as client:
        assert (await client.get("/tile/a")).status_code == 200
        (name,) = purse.wallet.names()
        before = purse.wallet.read(name), purse.log.path.read_bytes()
        for number in ("b", "c"):
            await client.get(f"/tile/{number}")
    file, _ = purse.wallet.open(name)
    file.save(before[0])
    file.release()
    purse.log.path.write_bytes(before[1])
    behind = purse_of(tmp_path)
    async with paid_async_client(behind, transport=market.transport, base_url="http://shop.example") as client:
        assert (await client.get("/tile/d")).status_code == 200


async def test_a_payment_fits_a_header(market: Market, tmp_path: Path) -> None:
    """The payment with all that the SDK sends back, offer, resource and identifier included, is far below the 8192 bytes of a usual limit."""
    from x402 import x402Client
    from x402.http.clients.httpx import x402AsyncTransport

    from paychan.x402 import pay_with

    sizes = []

    async def note(request: httpx.Request) -> None:
        sizes.append(len(request.headers.get("PAYMENT-SIGNATURE", "")))

    class Noting(httpx.ASGITransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await note(request)
            return await super().handle_async_request(request)

    transport = x402AsyncTransport(pay_with(x402Client(), purse_of(tmp_path), max_sat=100), Noting(market.app))
    async with httpx.AsyncClient(transport=transport, base_url="http://shop.example") as client:
        assert (await client.get("/tile/" + "5" * 500)).status_code == 200
    assert sizes[0] == 0
    assert 1_000 < sizes[1] < 4_096


def test_flask_sells_too(server: tuple[Shop, int], market: Market) -> None:
    """The SDK's middleware of Flask settles by the same facilitator, with blocking calls."""
    from flask import Flask
    from x402.http.middleware.flask import payment_middleware as flask_middleware

    from paychan.x402 import Seller

    seller = Seller(market.url, market.token, blocking=True)
    app = Flask("shop")
    flask_middleware(app, {"GET /tile/*": seller.route(PRICE_SAT)}, seller.server)

    @app.get("/tile/<number>")
    def tile(number: str) -> dict[str, str]:
        if number == "fails":
            raise ValueError
        return {"tile": number}

    customer = Customer(market)
    client = app.test_client()
    found = {}
    for number, paid_sat in (("5", PRICE_SAT), ("fails", 2 * PRICE_SAT), ("6", 2 * PRICE_SAT)):
        offered = client.get(f"/tile/{number}")
        header = customer.answer(read_required(offered.headers["PAYMENT-REQUIRED"]), paid_sat)
        found[number] = client.get(f"/tile/{number}", headers=header).status_code
    seller.close()
    assert found == {"5": 200, "fails": 500, "6": 200}


def test_prices_are_satoshi_and_not_dollars(market: Market) -> None:
    """A price in money needs an exchange rate, which the scheme does not have."""
    from paychan.x402 import SellingScheme

    scheme = SellingScheme()
    for price in ("$0.01", 1, 0.5, {"amount": "25", "asset": "USDC"}):
        with pytest.raises(ValueError, match="want satoshi"):
            scheme.parse_price(price, market.seller.network)


def test_a_facilitator_needs_the_token(market: Market) -> None:
    """Without the token of the merchant interface a seller's program does not start."""
    from x402 import x402ResourceServer
    from x402.http import FacilitatorConfig, HTTPFacilitatorClient

    server = x402ResourceServer(HTTPFacilitatorClient(FacilitatorConfig(url=market.url)))
    with pytest.raises(Exception, match="401"):
        server.initialize()
    assert httpx.get(market.system.url + "/supported").status_code == 404


PAGE = (ROOT / "paychan/x402/README.md").read_text()
MOST_LINES = 10


def example(heading: str) -> str:
    """Return the program below a heading of the page."""
    return re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.partition(f"## {heading}\n")[2])[0]


def test_the_examples_of_the_page_pay_each_other(
    server: tuple[Shop, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seller and a payer of at most ten lines: the payer prints what the seller answers."""
    import uvicorn

    for heading in ("Paying", "Selling"):
        assert len([line for line in example(heading).splitlines() if line.strip()]) <= MOST_LINES
    (found, port), shop_port = server, free_port()
    (tmp_path / "merchant.token").write_bytes((found.system.state / "merchant.token").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    with Payer(found.system.url) as payer:
        payer.channel_for(room_sat=1_000).release()
    program: dict[str, Any] = {"__name__": "shop"}
    exec(example("Selling").replace("8402", str(port)), program)
    shop = uvicorn.Server(uvicorn.Config(program["app"], port=shop_port, log_level="error", lifespan="off", ws="none"))

    async def serve() -> None:
        await shop.serve()
        await program["seller"].aclose()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        while not shop.started:
            assert thread.is_alive()
            time.sleep(0.01)
        exec(example("Paying").replace("5000", str(shop_port)), {"__name__": "payer"})
    finally:
        shop.should_exit = True
        thread.join(30)
    assert capsys.readouterr().out == '{"tile":5}\n'
