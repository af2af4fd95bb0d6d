"""The price list: what the file may say, and which route a request has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paychan.config import Gateway
from paychan.gateway.loading import load_prices
from paychan.gateway.offering import refusal
from paychan.gateway.pricefile import Timeouts
from paychan.gateway.prices import _CACHED_ROUTES, PriceList, one_price, parse_prices
from paychan.protocol.errors import AmbiguousPath, MethodNotAllowed
from paychan.protocol.saidprice import said_price
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Sat
from tests.lib.looped import looped
from tests.lib.readme import ROOT

TOP = 'upstream = "http://127.0.0.1:5000/base/"\n'


def route(path: str, rest: str = "price_sat = 1") -> str:
    return f'[[route]]\npath = "{path}"\n{rest}\n'


def listed(*routes: str, top: str = TOP) -> PriceList:
    return parse_prices(top + "".join(routes), "prices.toml")


@looped(
    ("text", "key", "reason"),
    [
        (TOP, "route", "at least one [[route]]"),
        (TOP + "colour = 1\n" + route("/a"), "colour", "unknown key"),
        (TOP + route("/a", "prize_sat = 1"), "route[0].prize_sat", "unknown key"),
        (TOP + route("/a") + "[timeouts]\nidle = 3\n", "timeouts.idle", "unknown key"),
        (TOP + route("/a") + "[timeouts]\nidle_seconds = 0\n", "timeouts.idle_seconds", "above 0"),
        (TOP + route("/a", 'price_sat = "1"'), "route[0].price_sat", '"1": want a whole number'),
        (TOP + route("/a", "price_sat = 1.5"), "route[0].price_sat", "1.5: want a whole number"),
        (TOP + route("/a", "price_sat = -1"), "route[0].price_sat", "-1: want a whole number from 0"),
        (TOP + route("/a", "price_sat = 2100000000000001"), "route[0].price_sat", "to 2100000000000000"),
        (TOP + route("/a", "price_sat = 0"), "route[0].price_sat", 'paths without a price are in "free"'),
        (TOP + route("/a", "price_sat = 1\nceiling_sat = 2"), "route[0].ceiling_sat", "want one of them"),
        (TOP + route("/a", 'unit = "second"\nceiling_sat = 2'), "route[0].ceiling_sat", "want price_sat"),
        (TOP + route("/a", 'unit = "token"\nprice_sat = 2'), "route[0].price_sat", "counts no tokens"),
        (TOP + route("/a", 'unit = "hour"\nprice_sat = 2'), "route[0].unit", '"hour": want "request"'),
        (TOP + route("/a", 'price_sat = 1\nmethods = ["get"]'), "route[0].methods", '"get": want capital'),
        (TOP + route("/a", 'price_sat = 1\nmethods = [""]'), "route[0].methods", '"": want capital'),
        (TOP + route("/a", 'price_sat = 1\nmethods = ["GET", "GET"]'), "route[0].methods", "twice"),
        (TOP + route("/a", 'price_sat = 1\ngives_back = ["6xx"]'), "route[0].gives_back", '"6xx": want'),
        ('gives_back = ["5x"]\n' + TOP + route("/a"), "gives_back", '"5x": want'),
        (TOP + route("/a", 'price_sat = 1\nmime_type = "png"'), "route[0].mime_type", '"png": want'),
        (TOP + route("/a", 'price_sat = 1\nrealm = "a\\"b"'), "route[0].realm", "want letters"),
        ('realm = "a\\r\\nSet-Cookie: x"\n' + TOP + route("/a"), "realm", "want letters"),
        (TOP + route("/a", 'price_sat = 1\ndescription = "a\\r\\nb"'), "route[0].description", "one line"),
        ('description = "a\\u0000b"\n' + TOP + route("/a"), "description", "one line"),
        (TOP + route("a"), "route[0].path", '"a": want a path that begins with "/"'),
        (TOP + route("/a/**/b"), "route[0].path", "at the end only"),
        (TOP + 'free = ["/a//b"]\n' + route("/a"), "free[0]", "empty or dot segment"),
        (route("/a"), "route[0].upstream", "required"),
        (TOP + route("/a", 'price_sat = 1\nupstream = "h:80"'), "route[0].upstream", '"h:80": want http://host[:port]'),
        ('upstream = "ftp://h"\n' + route("/a"), "upstream", "want http://"),
        ('upstream = "http://u:geheim@h"\n' + route("/a"), "upstream", "without user and password"),
        (TOP + route("/a") + "[allowance]\nrequests = 1\nseconds = 1\n", "allowance.seconds", "not both"),
        (TOP + route("/a") + "[allowance]\nhours = 1\nseconds = 3601\n", "allowance.seconds", "no request would"),
        (TOP + route("/a") + route("/a"), "route[1].path", '"/a": route[0] has this path and method, too'),
        (TOP + route("/a") + route("/A/"), "route[1].path", '"/A/": route[0] has this path'),
        (TOP + 'free = ["/a"]\n' + route("/a"), "free[0]", "route[0] has this path"),
        (
            TOP
            + route("/a", 'price_sat = 1\nmethods = ["GET", "PUT"]')
            + route("/a", 'price_sat = 2\nmethods = ["PUT"]'),
            "route[1].path",
            "this path and method",
        ),
        (TOP + route("/a/*") + route("/*/b"), "route[1].path", 'overlaps "/a/*" of route[0]'),
        (TOP + 'free = ["/*/b/**"]\n' + route("/a/**"), "free[0]", "neither is more special"),
        (
            TOP
            + route("/a/*", 'price_sat = 1\nmethods = ["GET"]')
            + route("/*/b", 'price_sat = 1\nmethods = ["HEAD"]'),
            "route[1].path",
            "overlaps",
        ),
        ("upstream = \n", "", "not TOML"),
    ],
)
def test_a_wrong_list_stops_with_file_key_and_reason(text: str, key: str, reason: str) -> None:
    """Unknown keys, impossible values and patterns of equal rank name the file, the key and the reason."""
    with pytest.raises(SettingsError) as caught:
        parse_prices(text, "prices.toml")

    assert caught.value.key == key
    assert reason in caught.value.reason
    assert caught.value.source == "prices.toml"
    assert "geheim" not in str(caught.value)


@looped(
    ("method", "path", "price"),
    [
        ("GET", "/a/b", 3), ("GET", "/a/c", 2), ("GET", "/a", 1), ("GET", "/a/b/c", 1), ("GET", "/a/free", 0),
        ("POST", "/a/b", 2), ("POST", "/a/free", 0), ("PUT", "/m", 5), ("GET", "/m", 4), ("HEAD", "/m", 4),
        ("DELETE", "/m", 5), ("get", "/m", 4), ("HEAD", "/h", 7), ("GET", "/h", 6),
    ],
)  # fmt: skip
def test_the_most_special_pattern_with_the_method_counts(method: str, path: str, price: int) -> None:
    """A literal before `*` before `**`; a pattern without the method leaves the request to the next one."""
    prices = listed(
        route("/a/**"),
        route("/a/*", "price_sat = 2"),
        route("/a/b", 'price_sat = 3\nmethods = ["GET"]'),
        route("/m", 'price_sat = 4\nmethods = ["GET"]'),
        route("/m", "price_sat = 5"),
        route("/h", 'price_sat = 6\nmethods = ["GET"]'),
        route("/h", 'price_sat = 7\nmethods = ["HEAD"]'),
        top=TOP + 'free = ["/a/free"]\n',
    )

    for _ in range(2):  # the second from the cache
        assert prices.find(method, path).amount_sat == price


def test_a_method_that_no_route_has_is_refused() -> None:
    """405, not 404: the path is for sale, by the methods that the answer names."""
    prices = listed(route("/a", 'price_sat = 1\nmethods = ["GET", "PUT"]'))

    with pytest.raises(MethodNotAllowed) as caught:
        prices.find("POST", "/a")

    assert dict(refusal(caught.value).headers)["Allow"] == "GET, HEAD, PUT"


def test_a_route_has_its_own_values_or_those_of_the_list() -> None:
    """A route has the values of the list in place of those that it leaves out."""
    prices = listed(
        route("/a"),
        route(
            "/b",
            'ceiling_sat = 9\nunit = "token"\ndescription = "B"\nrealm = "b.example"\nupstream = "https://b"\n'
            'gives_back = ["429"]\nconnect_seconds = 1\nidle_seconds = 2\npause_seconds = 3',
        ),
        "[timeouts]\nfirst_byte_seconds = 7\n[metering]\npause_seconds = 8\n",
        top=TOP + 'realm = "list"\ndescription = "L"\ngives_back = ["5xx", "404"]\n',
    )
    own, other = prices.find("GET", "/a"), prices.find("GET", "/b")

    assert (own.unit, own.amount_sat, own.is_ceiling, own.is_metered) == ("request", 1, False, False)
    assert (own.realm, own.description, own.upstream) == ("list", "L", "http://127.0.0.1:5000/base")
    assert own.timeouts == Timeouts(connect_seconds=5, first_byte_seconds=7, idle_seconds=60)
    assert (own.pause_seconds, own.gives_back) == (8, frozenset({404, *range(500, 600)}))
    assert (other.unit, other.amount_sat, other.is_ceiling) == ("token", 9, True)
    assert (other.realm, other.description, other.upstream) == ("b.example", "B", "https://b")
    assert other.timeouts == Timeouts(connect_seconds=1, first_byte_seconds=7, idle_seconds=2)
    assert (other.pause_seconds, other.gives_back) == (3, frozenset({429}))


def test_the_memory_for_found_routes_is_bounded() -> None:
    """Requests for ever new paths do not grow the table, and refused paths do not enter it."""
    prices = one_price("http://h", Sat(5), "test")
    for number in range(3 * _CACHED_ROUTES):
        prices.find("GET", f"/{number}")
    prices.find("GET", "/" + "x" * 1000)

    assert len(prices._found) <= _CACHED_ROUTES
    assert max(len(path) for _, path in prices._found) < 1000
    with pytest.raises(AmbiguousPath):
        prices.find("GET", "/a//b")
    assert ("GET", "/a//b") not in prices._found


def test_a_first_try_has_one_price_for_all(tmp_path: Path) -> None:
    """`gateway.upstream` and `price_sat` make a list; `prices` names a file; a missing file says so."""
    first = load_prices(Gateway(upstream="http://h:1", price_sat=25), "server.toml")
    file = tmp_path / "prices.toml"
    file.write_text(TOP + route("/a", "price_sat = 3"))
    second = load_prices(Gateway(prices=str(file)), "server.toml")

    assert first.find("POST", "/x/y").amount_sat == 25
    assert second.find("GET", "/a").amount_sat == 3
    with pytest.raises(SettingsError, match=r"can't be read \(gateway.prices of server.toml\)"):
        load_prices(Gateway(prices=str(tmp_path / "none.toml")), "server.toml")


def test_the_example_of_the_page_is_a_price_list() -> None:
    """The page's example is valid, and has the prices that the page names."""
    page = (ROOT / "paychan" / "gateway" / "README.md").read_text()
    example = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    prices = parse_prices(example[1] if example else "", "README.md")

    assert prices.find("GET", "/v1/tile/5").amount_sat == 25
    assert prices.find("GET", "/health").is_free
    assert prices.find("GET", "/video/a").is_metered
    assert prices.find("POST", "/v1/chat").is_ceiling


@looped(
    ("price", "overrides", "amount", "trouble"),
    [
        ("17", None, 17, ""), (" 0 ", None, 0, ""), ("100", None, 100, ""), ("17", '{"amount":"3"}', 17, ""),
        (None, '{"amount":"10"}', 10, ""), (None, '{"amount":"40%"}', 40, ""), (None, '{"amount":"0.1%"}', 1, ""),
        (None, '{"amount":"0%"}', 0, ""), (None, '{"amount":"100%"}', 100, ""),
        ("101", None, 100, "got 101 sat, limit 100 sat"), (None, '{"amount":"101%"}', 100, "got 101 sat"),
        (None, None, 100, "has no X-Paychan-Price"), ("-1", None, 100, "no amount"), ("1.5", None, 100, "no amount"),
        ("٣", None, 100, "no amount"), ("", None, 100, "no amount"), ("40%", None, 100, "no amount"),
        (None, '{"amount":"$0.01"}', 100, "no amount"), (None, '{"amount":10}', 100, "no amount"),
        (None, "{}", 100, "no amount"), (None, "10", 100, "no amount"), (None, "{", 100, "no amount"),
    ],
)  # fmt: skip
def test_the_price_that_an_upstream_says(price: str | None, overrides: str | None, amount: int, trouble: str) -> None:
    """Never above the ceiling; without a readable amount it is the ceiling, with a sentence for the seller's log."""
    said = said_price(price, overrides, Sat(100))

    assert said.amount_sat == amount
    assert trouble in said.trouble
    assert bool(said.trouble) == bool(trouble)
