"""ASGI alone: WebSockets, wrong use, restarts of the server, and the port with the token."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets.sync.client
from websockets.exceptions import InvalidStatus

from paychan.sell import Price, charge, priced, sold
from paychan.sell.asgi import Paywall
from paychan.sell.requests import Request, price_of
from tests.lib.system import System
from tests.sell.programs import Controls, starlette
from tests.sell.shop import Customer, Shop, raw, serve_asgi, settled


def ws(url: str) -> str:
    return url.replace("http:", "ws:") + "/ws"


async def lifespan(receive: Any, send: Any) -> None:
    """Begin and end a program without a framework."""
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


def test_a_websocket_passes_without_payments_or_is_refused(shop: Shop) -> None:
    """Beside priced handlers it passes, without forged headers; under a price for all it is refused."""
    forged = {"X-Paychan-Credit": "5", "PAYMENT-SIGNATURE": "x"}
    with (
        starlette(Controls(), shop.socket) as url,
        websockets.sync.client.connect(ws(url), additional_headers=forged) as found,
    ):
        names = str(found.recv())
        assert "sec-websocket-key" in names
        assert "paychan" not in names
        assert "payment" not in names

    async def never(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await lifespan(receive, send)

    with serve_asgi(Paywall(never, shop.socket, price=25)) as url, pytest.raises(InvalidStatus, match="403"):
        websockets.sync.client.connect(ws(url))


def test_one_price_for_a_whole_application(shop: Shop, customer: Customer) -> None:
    """Every path has it, also of a program without a framework; a handler that is gone is credit."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["path"] == "/nothing":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(scope["paychan"].charged_sat).encode()})

    with serve_asgi(
        Paywall(app, shop.socket, price=Price(30, description="All"), public_url="https://a.example")
    ) as url:
        offered = raw(url + "/any")
        assert offered.json()["priceSat"] == 30
        head = raw(url + "/any", method="HEAD")
        assert (head.status_code, head.content, "payment-required" in head.headers) == (402, b"", True)
        answer = raw(url + "/any", headers=customer.headers(offered, 60))
        assert (answer.text, settled(answer).charged_sat) == ("30", 30)
        assert customer.get(url + "/nothing", 0).status_code == 500
        assert customer.sums() == (60, 30)


def test_wrong_use_is_an_error_and_serves_nothing() -> None:
    """No middleware, no place, two prices, a charge above the price, a price that is no amount."""

    @priced(25)
    def handler() -> None:
        raise AssertionError

    with pytest.raises(RuntimeError, match="add the middleware"):
        handler()
    for use in (lambda: charge(1), sold):
        with pytest.raises(RuntimeError, match="no Paywall serves this request"):
            use()
    with pytest.raises(TypeError, match="either a price or a ceiling"):
        priced()
    with pytest.raises(TypeError, match="either a price or a ceiling"):
        priced(1, ceiling=2)
    with pytest.raises(ValueError, match=r"merchant\.sock"):
        Paywall(handler)  # type: ignore[arg-type] # it is not reached
    with pytest.raises(ValueError, match=r"merchant\.token"):
        Paywall(handler, "http://127.0.0.1:1")  # type: ignore[arg-type] # it is not reached
    request = Request("GET", "http://a.example/", {})
    for wrong in (-1, True, 2.5, "25", None):
        with pytest.raises(ValueError, match="whole number of satoshi"):
            price_of(lambda _, wrong=wrong: wrong, request)


def test_two_prices_and_a_charge_above_the_price_fail(shop: Shop, customer: Customer) -> None:
    """The handler's error gives the price back."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    @priced(25)
    @priced(25)
    async def twice(_: Any) -> Any:
        raise AssertionError

    @priced(25)
    async def above(_: Any) -> Any:
        charge(26)

    app = Starlette(routes=[Route("/twice", twice), Route("/above", above)])
    with serve_asgi(Paywall(app, shop.socket)) as url:
        for path in ("/twice", "/above"):
            assert customer.get(url + path, 25 if path == "/twice" else 0).status_code == 500
        assert customer.sums() == (25, 0)


@pytest.fixture
def by_port(tmp_path: Path) -> Iterator[tuple[Shop, int]]:
    """A server whose merchant interface has a port, too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with System(tmp_path / "system", sections={"merchant": f"on = true\nport = {port}"}) as system:
        yield Shop(system, tmp_path / "wallet"), port


def test_the_port_and_a_restart_of_the_server(by_port: tuple[Shop, int]) -> None:
    """A program goes on after the server was killed: its pooled connections are replaced, and the credit is there."""
    shop, port = by_port
    customer = Customer(shop)
    token = shop.system.state / "merchant.token"
    with starlette(Controls(), f"http://127.0.0.1:{port}", token_file=token) as url:
        assert customer.get(url + "/tile", 50).status_code == 200
        shop.system.kill_server()
        assert raw(url + "/tile").status_code == 503
        shop.system.start_server()
        assert customer.get(url + "/tile?other", 0).status_code == 200
        assert customer.sums() == (50, 50)
