"""Terms, price lists and requests for the tests of the gateway's offers."""

from __future__ import annotations

import httptools

from paychan.gateway.asking import Facts
from paychan.gateway.offering import Offering
from paychan.gateway.prices import PriceList, Route, parse_prices
from paychan.protocol.types import Sat
from paychan.protocol.wire.offers import CHAINS, Offer

SECRET = b"secret of the tests"
NOW = 1_796_000_000.5

TERMS = Offer(
    amount_sat=Sat(0),
    unit="request",
    chain=CHAINS["regtest"],
    identity=bytes.fromhex("0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"),
    pay_url="https://pay.example",
    network="regtest",
    open_price_sat=Sat(70_000),
    min_confirmations=6,
    settlement_period_seconds=21_600,
    dust_sat=Sat(700),
    realm="",
)

PRICES = parse_prices(
    """
    upstream = "http://127.0.0.1:5000"
    realm = "tiles.example"
    description = "Map tiles <b>&amp; \\"more\\""
    free = ["/health"]
    [[route]]
    path = "/v1/tile/*"
    price_sat = 25
    mime_type = "image/png"
    [[route]]
    path = "/v1/chat"
    methods = ["POST"]
    unit = "token"
    ceiling_sat = 500
    [[route]]
    path = "/video/**"
    unit = "second"
    price_sat = 2
    """,
    "test",
)

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def make_offering(terms: Offer = TERMS) -> Offering:
    return Offering(terms, lambda: (SECRET, b"older"))


def asked(target: str = "/v1/tile/5", method: str = "GET", host: str = "api.example", **facts: str) -> Facts:
    return Facts(method, host, target, **facts)


def route_of(request: Facts, prices: PriceList = PRICES) -> Route:
    return prices.find(request.method, request.target.partition("?")[0])


class Parsed:
    """An answer as a strict HTTP parser reads it; a `head` is the answer to a HEAD."""

    def __init__(self, raw: bytes) -> None:
        self.headers: list[tuple[str, str]] = []
        self.is_complete = False
        parser = httptools.HttpResponseParser(self)
        head, _, self.body = raw.partition(b"\r\n\r\n")
        parser.feed_data(head + b"\r\n\r\n")
        self.status = parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode().lower(), value.decode()))

    def one(self, name: str) -> str:
        """Return the only value of a header."""
        (value,) = [value for each, value in self.headers if each == name.lower()]
        return value

    def names(self) -> list[str]:
        return [name for name, _ in self.headers]
