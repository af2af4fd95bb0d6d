"""The page that browsers get: it loads nothing, runs nothing, and shows every text as text."""

from __future__ import annotations

import ast
import shlex
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

from msgspec.structs import replace

from paychan.gateway.page import URL_PLACE, filled, in_words, page
from paychan.protocol.types import Sat
from tests.gateway.offers import BROWSER, NOW, TERMS, Parsed, asked, make_offering, route_of
from tests.lib.looped import looped

HOSTILE = "<script>alert(1)</script>\"'&amp;</pre><img src=x onerror=y>{price}%s\\"

OFFER = replace(TERMS, amount_sat=Sat(1234), realm="tiles.example", description=HOSTILE)


class Seen(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(content.decode())

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open, []).append(data)


def shown(target: str = "/v1/tile/5") -> tuple[Parsed, Seen]:
    request = asked(target, accept=BROWSER)
    answer = Parsed(make_offering().answer(request, route_of(request), NOW))
    return answer, Seen(answer.body)


def test_the_policy_allows_the_one_style_alone() -> None:
    """The hash in Content-Security-Policy is that of the style; nothing else may load, run, or frame the page."""
    answer, seen = shown()
    (style,) = seen.texts["style"]
    digest = b64encode(sha256(style.encode()).digest()).decode()

    assert answer.status == 402
    assert answer.one("Content-Security-Policy") == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert answer.one("Referrer-Policy") == "no-referrer"
    assert answer.one("Cache-Control") == "no-store"


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    """No script, no attribute that loads or runs something, no style attribute; the only link is that to the server."""
    _, seen = shown("/v1/tile/5?a=<script>")
    names = {name for name, _ in seen.elements}
    attributes = {(name, value) for _, found in seen.elements for name, value in found.items()}

    assert not names & {"script", "img", "link", "iframe", "object", "embed", "form", "base", "image", "use"}
    assert not {name for name, _ in attributes if name.startswith("on") or name in ("src", "style", "xlink:href")}
    assert {value for name, value in attributes if name == "href"} == {"https://pay.example"}
    assert len([name for name, _ in seen.elements if name == "svg"]) == 1


def test_texts_of_the_seller_are_texts() -> None:
    """A description with markup stands on the page as it is, and adds no element."""
    plain, hostile = (Seen(page(offer, is_ceiling=False)) for offer in (replace(OFFER, description="x"), OFFER))

    assert [name for name, _ in hostile.elements] == [name for name, _ in plain.elements]
    assert "".join(hostile.texts["p"]).count(HOSTILE) == 1


@looped(
    "query",
    [
        "",
        "a=1&b=2",
        "a=1&copy=2&lt;=3",
        "a='; rm -rf /;'",
        'a="); exit()',
        "$(x)`y`",
        "a\\b",
        "</pre><script>",
        "ä\u2028",
        "\x00URL\x00",
    ],
)
def test_the_code_names_the_url_and_does_nothing_else(query: str) -> None:
    """The shell reads one argument, Python one text: the URL, with all else percent-encoded."""
    url = "https://api.example/v1/tile/5" + (f"?{query}" if query else "")
    seen = Seen(filled(page(OFFER, is_ceiling=False), url))
    command, python = seen.texts["pre"]
    install, pay = command.splitlines()
    words = shlex.split(pay)

    assert install == "pip install paychan"
    assert words[:4] == ["paychan", "pay", "--max", "1234"]
    assert len(words) == 5
    assert not set(words[4]) & set("'\"\\$`<> {}")
    assert words[4].startswith("https://api.example/v1/tile/5")
    assert f'.get("{words[4]}")' in python
    assert words[4] == url or not query.startswith("a=1&")
    assert [type(line).__name__ for line in ast.parse(python).body] == ["ImportFrom", "ImportFrom", "Assign"]
    assert [name for name, _ in seen.elements].count("pre") == 2


def test_the_code_is_that_of_the_library() -> None:
    """The names of the Python lines exist, and the budget is the price."""
    _, python = Seen(filled(page(OFFER, is_ceiling=False), "https://api.example/")).texts["pre"]
    names: dict[str, Any] = {}
    exec("\n".join(python.splitlines()[:2]), names)

    assert eval(python[python.index("Budget(") : python.index(").get")], names).per_request == 1234
    assert callable(names["paid_client"])


def test_the_page_has_the_price_and_the_terms() -> None:
    """Price, unit, place, least size of a channel and confirmations, each in words."""
    text = page(replace(OFFER, unit="kilobyte", min_confirmations=1), is_ceiling=True).decode()

    assert "At most <b>1,234 satoshi</b>" in text
    assert "for each kilobyte" in text
    assert "70,000" in text
    assert "after 1 confirmation." in text
    assert text.count(URL_PLACE.decode()) == 2
    assert in_words(OFFER, is_ceiling=False) == "1,234 satoshi for each request"
