"""Catalogues of the gateway: valid by their standards, with the prices of the list, without the seller's upstreams."""

from __future__ import annotations

import json
import re

import msgspec

from paychan.gateway.discovery import _MOST_KEPT, LLMS, OPENAPI, WELL_KNOWN, Catalogues
from paychan.gateway.prices import PriceList, one_price, parse_prices
from paychan.protocol.types import Sat
from paychan.protocol.wire import x402
from paychan.protocol.wire.x402_json import read_required
from tests.gateway.offers import NOW, PRICES, TERMS, asked, make_offering
from tests.lib.looped import looped

ORIGIN = "https://api.example"

ALL_SHAPES = parse_prices(
    """
    upstream = "http://geheim.internal:5000"
    description = "Everything # <b>"
    free = ["/free/**", "/health"]
    [[route]]
    path = "/**"
    price_sat = 1
    [[route]]
    path = "/a/**"
    price_sat = 3
    [[route]]
    path = "/a/*"
    methods = ["GET", "PATCH", "PURGE"]
    price_sat = 2
    [[route]]
    path = "/a/*/c%C3%A9/*/**"
    methods = ["POST"]
    ceiling_sat = 4
    description = "Special"
    """,
    "test",
)


def document(prices: PriceList, path: str, origin: str = ORIGIN) -> dict:
    content = Catalogues(prices, TERMS, NOW).at(path, origin)
    assert content is not None
    return json.loads(content)


@looped("prices", [PRICES, ALL_SHAPES, one_price("http://h", Sat(5), "test")], ids=["usual", "all", "one"])
def test_the_openapi_document_is_valid(prices: PriceList) -> None:
    """OpenAPI 3.1 by its schema and by the rules beyond it, also for patterns that have no form there."""
    from openapi_spec_validator import (  # takes 2 s, and each worker collects this file
        OpenAPIV31SpecValidator,
        validate,
    )

    validate(document(prices, OPENAPI), cls=OpenAPIV31SpecValidator)


def test_operations_have_their_offers() -> None:
    """Priced operations have the price and a 402; a price that the upstream says is dynamic; free ones have neither."""
    paths = document(PRICES, OPENAPI)["paths"]
    tile, chat = paths["/v1/tile/{part1}"]["get"], paths["/v1/chat"]["post"]

    assert tile["x-payment-info"]["offers"] == [
        {
            "intent": "session",
            "method": "bitcoin",
            "amount": "25",
            "currency": "sat",
            "description": "25 satoshi for each request",
        }
    ]
    assert tile["responses"]["200"]["content"] == {"image/png": {}}
    assert chat["x-payment-info"]["offers"][0]["amount"] is None
    assert "402" in chat["responses"]
    assert set(paths["/v1/chat"]) == {"post"}
    assert "x-payment-info" not in paths["/health"]["get"]
    assert "402" not in paths["/health"]["get"]["responses"]


def test_the_more_special_pattern_gives_an_operation_its_price() -> None:
    """`/a/*` and `/a/**` have one template: a method of both has the price that a request has."""
    item = document(ALL_SHAPES, OPENAPI)["paths"]["/a/{part1}"]
    prices = {
        method: operation["x-payment-info"]["offers"][0]["amount"]
        for method, operation in item.items()
        if method != "parameters"
    }

    assert prices == {"get": "2", "patch": "2", "put": "3", "post": "3", "delete": "3"}
    for method, price in prices.items():
        assert ALL_SHAPES.find(method, "/a/x").amount_sat == int(price)


def test_the_manifest_has_the_offers_of_the_answers() -> None:
    """A route has the same offer in the manifest as in the answer to a request."""
    manifest = document(PRICES, WELL_KNOWN)
    items = {(item["input"]["method"], item["input"]["routeTemplate"]): item for item in manifest["items"]}
    tile = items["GET", "/v1/tile/:part1"]
    request = asked(scheme="https")
    answer = make_offering().structured(request, PRICES.find("GET", "/v1/tile/5"), NOW)
    live = read_required(dict(answer.headers)["PAYMENT-REQUIRED"])

    assert (manifest["x402Version"], manifest["lastUpdated"]) == (2, int(NOW))
    assert tile["resource"]["url"] == "https://api.example/v1/tile/:part1"
    assert tile["input"]["pathParams"]["required"] == ["part1"]
    assert tile["output"] == {"mimeType": "image/png"}
    assert tile["accepts"] == json.loads(msgspec.json.encode(live))["accepts"]
    assert x402.offers(live)[0].offer.amount_sat == 25
    assert not [path for _, path in items if path == "/health"]


@looped("path", [WELL_KNOWN, OPENAPI, LLMS])
def test_no_catalogue_names_an_upstream(path: str) -> None:
    """Addresses of the seller's network stay inside."""
    content = Catalogues(ALL_SHAPES, TERMS, NOW).at(path, ORIGIN) or b""

    assert b"geheim" not in content
    assert b"5000" not in content


def test_the_text_names_prices_and_the_way_to_pay() -> None:
    """Each route is a line with method, URL and price; text of the seller is no markup."""
    text = (Catalogues(ALL_SHAPES, TERMS, NOW).at(LLMS, ORIGIN) or b"").decode()

    assert text.startswith("# api.example\n\n> Everything \\# \\<b\\>\n")
    assert "`GET, PATCH, PURGE https://api.example/a/{part1}`: 2 satoshi for each request\n" in text
    assert (
        "`POST https://api.example/a/{part1}/c%C3%A9/{part2}/{part3}`: at most 4 satoshi for each request. Special\n"
        in text
    )
    assert "- `https://api.example/free/{part1}`\n" in text
    assert "<https://pay.example>" in text
    assert re.search(r"paychan pay --max", text)


def test_the_price_list_may_name_the_paths_itself() -> None:
    """A seller's own document wins; other paths have no catalogue."""
    own = parse_prices(
        'upstream = "http://h"\nfree = ["/openapi.json"]\n[[route]]\npath = "/**"\nprice_sat = 1\n', "test"
    )
    catalogues = Catalogues(own, TERMS, NOW)

    assert catalogues.at(OPENAPI, ORIGIN) is None
    assert catalogues.at("/", ORIGIN) is None
    assert catalogues.at(LLMS, ORIGIN) is not None


def test_each_origin_has_its_own_and_the_memory_is_bounded() -> None:
    """A stranger's Host header changes the URLs of its own catalogue alone, and fills nothing."""
    catalogues = Catalogues(PRICES, TERMS, NOW)
    for number in range(3 * _MOST_KEPT):
        content = catalogues.at(LLMS, f"http://h{number}.example")
        assert content is not None
        assert f"http://h{number}.example/v1".encode() in content

    assert len(catalogues._kept) <= _MOST_KEPT
    assert b"h1.example" not in (catalogues.at(LLMS, ORIGIN) or b"")
