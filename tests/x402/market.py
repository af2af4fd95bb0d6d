"""A seller's program with the SDK's middleware, settled by a real server's facilitator, and payers of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from paychan.client import Budget, Need, Payer, Purse
from paychan.protocol.wire import x402
from paychan.protocol.wire.offers import Voucher
from paychan.protocol.wire.x402_json import PaymentRequired, read_required
from tests.gateway.shop import Shop, open_shop
from tests.lib import rbpcp
from tests.lib.ports import free_port

OPENING_SAT, PRICE_SAT, LEASE_SECONDS = 100_000, 25, 60


class Market:
    """The seller's program; `served` are the paths that its handlers answered."""

    def __init__(self, shop: Shop, port: int) -> None:
        from fastapi import FastAPI, HTTPException
        from x402.http.middleware.fastapi import payment_middleware

        from paychan.x402 import Seller

        self.shop, self.system, self.url = shop, shop.system, f"http://127.0.0.1:{port}"
        self.token = (shop.system.state / "merchant.token").read_text().strip()
        self.seller = Seller(self.url, self.token)
        self.served: list[str] = []
        self.app = FastAPI()
        route = self.seller.route(PRICE_SAT, "one map tile", "application/json")
        self.app.middleware("http")(
            payment_middleware({"GET /tile/*": route, "GET /fails/*": route}, self.seller.server)
        )

        @self.app.get("/tile/{number}")
        async def tile(number: str) -> dict[str, str]:
            self.served.append(number)
            return {"tile": number}

        @self.app.get("/fails/{status}")
        async def fails(status: int) -> None:
            raise HTTPException(status)

    @property
    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self.app)

    def client(self) -> httpx.AsyncClient:
        """Return a client that pays nothing."""
        return httpx.AsyncClient(transport=self.transport, base_url="http://shop.example")

    def paying(self, purse: Purse) -> httpx.AsyncClient:
        """Return the SDK's client with a wallet's plug-in."""
        from x402 import x402Client
        from x402.http.clients.httpx import x402AsyncTransport

        from paychan.x402 import pay_with

        transport = x402AsyncTransport(pay_with(x402Client(), purse, max_sat=100), self.transport)
        return httpx.AsyncClient(transport=transport, base_url="http://shop.example")


class Customer:
    """A payer with one open channel, who signs what it wants."""

    def __init__(self, market: Market) -> None:
        self.market, self.payer = market, rbpcp.Payer()
        with httpx.Client() as http:
            opened = rbpcp.V2(market.system.url, self.payer, http).open(self.payer.payment(OPENING_SAT))
        assert opened.status_code == 201, opened.text

    async def header(self, more_sat: int, path: str = "/tile/1", name: str = "") -> dict[str, str]:
        """Answer the offer of a path with the payment that gives `more_sat` more than the opening."""
        async with self.market.client() as http:
            offered = await http.get(path)
        return self.answer(read_required(offered.headers["PAYMENT-REQUIRED"]), more_sat, name)

    def answer(self, required: PaymentRequired, more_sat: int, name: str = "") -> dict[str, str]:
        """Answer an offer."""
        payment = self.payer.payment(OPENING_SAT + more_sat)
        voucher = Voucher.of(self.payer.outpoint, self.payer.funding_sat, payment)
        (found,) = x402.offers(required)
        return {"PAYMENT-SIGNATURE": x402.payment_header(found, voucher, required.resource, name)}


@contextmanager
def open_server(directory: Path) -> Iterator[tuple[Shop, int]]:
    """Run a server with a gateway, and the merchant interface on a port."""
    port = free_port()
    settings = {"merchant": f"on = true\nport = {port}\nlease_seconds = {LEASE_SECONDS}"}
    with open_shop(directory, sections=settings) as shop:
        yield shop, port


def purse_of(directory: Path, **limits: Any) -> Purse:
    """Return an empty wallet that opens a channel if it has none."""
    wallet = directory / "wallet"

    def open_channel(need: Need) -> None:
        with Payer(need.pay_url, wallet=wallet) as payer:
            payer.channel_for(room_sat=need.room_sat)

    return Purse(Budget(**(limits or {"total": 10_000})), wallet, open_channel=open_channel)
