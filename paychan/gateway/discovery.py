"""Catalogues of what a gateway sells, written from its price list: for x402, as OpenAPI, and as text for language models.

The 402 answer alone is binding; a catalogue says what the list says at the moment. None of them names an upstream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from paychan.gateway.page import in_words
from paychan.gateway.prices import PriceList, Route
from paychan.protocol.types import UnixTime
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.offers import Offer
from paychan.protocol.wire.x402_json import VERSION, Resource

WELL_KNOWN, OPENAPI, LLMS = "/.well-known/x402.json", "/openapi.json", "/llms.txt"
"""Paths that the gateway answers itself, unless the price list names them."""

MAX_AGE_SECONDS = 300
"""Time for which a catalogue may be stored."""

HEADERS = (("Cache-Control", f"max-age={MAX_AGE_SECONDS}"), ("Access-Control-Allow-Origin", "*"))
"""Headers of every catalogue, beside its type."""

TYPES = {WELL_KNOWN: "application/json", OPENAPI: "application/json", LLMS: "text/plain; charset=utf-8"}

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
"""Methods that OpenAPI 3.1 has, in its order."""

_USUAL = ("get", "put", "post", "delete", "patch")
"""Methods of a catalogue for a route that is for all that no other route names."""


_MOST_KEPT = 64
"""Catalogues kept at a time: one for each of the three paths and each host by which clients name the gateway."""


class Catalogues:
    """The catalogues of one price list, written once for each origin. It is used on one thread."""

    def __init__(self, prices: PriceList, terms: Offer, read_at: float) -> None:
        """Write nothing yet.

        Args:
            prices: the price list.
            terms: identity, place and terms of new channels, as `offering.Offering` has them.
            read_at: Unix time at which the price list was read.
        """
        self._prices, self._terms, self._read_at = prices, terms, UnixTime(int(read_at))
        named = {route.path for route in prices.routes}
        self._paths = frozenset(TYPES) - named
        self._kept: dict[tuple[str, str], bytes] = {}

    def at(self, path: str, origin: str) -> bytes | None:
        """Return the catalogue at a path; None if there is none, or the price list names the path.

        Args:
            path: of the request, without query.
            origin: scheme and host of the request, such as `https://api.example`.
        """
        if path not in self._paths:
            return None
        found = self._kept.get((path, origin))
        if found is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            found = self._kept[path, origin] = self._written(path, origin)
        return found

    def _written(self, path: str, origin: str) -> bytes:
        if path == WELL_KNOWN:
            return msgspec.json.encode(x402_manifest(self._prices, self._terms, origin, self._read_at))
        if path == OPENAPI:
            return msgspec.json.encode(openapi(self._prices, self._terms, origin))
        return llms_text(self._prices, self._terms, origin).encode()


def x402_manifest(prices: PriceList, terms: Offer, origin: str, now: UnixTime) -> dict[str, Any]:
    """Write the manifest of x402's draft for `/.well-known/x402.json`: each method of each priced route is one item."""
    items = []
    for route in _priced(prices):
        offer = _offer(route, terms, origin)
        template, names = _template(route.path, ":{}")
        resource = Resource(
            url=origin + template,
            description=offer.description or None,
            mime_type=route.mime_type or None,
            service_name=offer.realm[:32] or None,
        )
        for method in _methods_of(route, prices):
            shown: dict[str, Any] = {"method": method.upper(), "routeTemplate": template}
            if names:
                shown["pathParams"] = {
                    "type": "object",
                    "properties": {name: {"type": "string"} for name in names},
                    "required": names,
                }
            item = {"resource": resource, "type": "http", "accepts": [x402.requirements(offer)], "input": shown}
            items.append(item | ({"output": {"mimeType": route.mime_type}} if route.mime_type else {}))
    return {"x402Version": VERSION, "lastUpdated": now, "items": items}


def openapi(prices: PriceList, terms: Offer, origin: str) -> dict[str, Any]:
    """Write the OpenAPI 3.1 document with MPP's extensions `x-payment-info` and `x-service-info`."""
    paths: dict[str, dict[str, Any]] = {}
    for route in sorted(prices.routes, key=lambda route: route.path.endswith("**")):  # its template may be that of "*"
        template, names = _template(route.path, "{{{}}}")
        item = paths.setdefault(template, {})
        if names:
            item["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        for method in _methods_of(route, prices):
            if method in _METHODS:
                item.setdefault(method, _operation(route, _offer(route, terms, origin)))
    name = prices.realm or origin.partition("://")[2]
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": "1", **({"description": prices.description} if prices.description else {})},
        "servers": [{"url": origin}],
        "x-service-info": {"docs": {"llms": origin + LLMS}},
        "paths": {path: item for path, item in paths.items() if set(item) - {"parameters"}},
        "components": {"schemas": {"Problem": _PROBLEM}},
    }


_PROBLEM = {
    "type": "object",
    "description": "RFC 9457, with the price of the resource",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "why a payment was refused"},
        "challengeId": {"type": "string"},
        "priceSat": {"type": "integer", "minimum": 0},
        "unit": {"type": "string"},
        "isCeiling": {"type": "boolean"},
        "payUrl": {"type": "string", "format": "uri"},
    },
}


def _operation(route: Route, offer: Offer) -> dict[str, Any]:
    content: dict[str, Any] = {"content": {route.mime_type: {}}} if route.mime_type else {}
    shown: dict[str, Any] = {
        **({"summary": offer.description} if offer.description else {}),
        "responses": {"200": {"description": "The answer of the service", **content}},
    }
    if not route.is_free:
        shown["x-payment-info"] = {"offers": [_mpp_offer(route, offer)]}
        shown["responses"]["402"] = {
            "description": "Payment required: " + in_words(offer, is_ceiling=route.is_ceiling),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    return shown


def _mpp_offer(route: Route, offer: Offer) -> dict[str, Any]:
    """Write an offer; a price that the upstream says later is dynamic, which is null."""
    return {
        "intent": mpp.INTENT,
        "method": mpp.METHOD,
        "amount": None if route.is_ceiling else str(offer.amount_sat),
        "currency": mpp.CURRENCY,
        "description": in_words(offer, is_ceiling=route.is_ceiling),
    }


def llms_text(prices: PriceList, terms: Offer, origin: str) -> str:
    """Write `/llms.txt`: what is sold and how a program pays, as Markdown."""
    name = prices.realm or origin.partition("://")[2]
    lines = [f"# {_plain(name)}", ""]
    lines += [f"> {_plain(prices.description)}", ""] if prices.description else []
    lines += [
        (
            "Requests without a payment get 402 with the price, in x402 (`PAYMENT-REQUIRED`) and in MPP "
            "(`WWW-Authenticate: Payment`). A payment channel on Bitcoin pays them: one signature for each request."
        ),
        "",
        (
            f"- Channels are opened at <{terms.pay_url}> (network {terms.network}): at least "
            f"{terms.open_price_sat} satoshi, {terms.min_confirmations} confirmations."
        ),
        "- Command line: `pip install paychan`, then `paychan pay --max SATOSHI URL`; `--open` opens a channel if there is none.",
        f"- [OpenAPI]({origin}{OPENAPI}): operations with prices",
        f"- [x402]({origin}{WELL_KNOWN}): offers",
        "",
        "## Prices",
        "",
    ]
    for route in _priced(prices):
        offer = _offer(route, terms, origin)
        price = in_words(offer, is_ceiling=route.is_ceiling)
        own = f". {_plain(route.description)}" if route.description not in ("", prices.description) else ""
        methods = ", ".join(method.upper() for method in _methods_of(route, prices))
        lines.append(f"- `{methods} {origin}{_template(route.path, '{{{}}}')[0]}`: {price}{own}")
    free = [route for route in prices.routes if route.is_free]
    lines += (
        ["", "## Free", "", *(f"- `{origin}{_template(route.path, '{{{}}}')[0]}`" for route in free)] if free else []
    )
    return "\n".join(lines) + "\n"


def _priced(prices: PriceList) -> Iterable[Route]:
    return (route for route in prices.routes if not route.is_free)


def _offer(route: Route, terms: Offer, origin: str) -> Offer:
    realm = route.realm or origin.partition("://")[2]
    return replace(terms, amount_sat=route.amount_sat, unit=route.unit, realm=realm, description=route.description)


def _methods_of(route: Route, prices: PriceList) -> list[str]:
    """Return a route's methods in lower case; HEAD only where the list names it, as GET includes it."""
    if route.methods:
        return [method.lower() for method in route.methods]
    named = {method.lower() for other in prices.routes if other.path == route.path for method in other.methods}
    return [method for method in _USUAL if method not in named]


def _template(pattern: str, form: str) -> tuple[str, list[str]]:
    """Return a pattern as a template, with a name for each `*` and `**`, and these names."""
    names: list[str] = []
    parts = []
    for part in pattern.split("/"):
        if part in ("*", "**"):
            names.append(f"part{len(names) + 1}")
            parts.append(form.format(names[-1]))
        else:
            parts.append(part)
    return "/".join(parts), names


def _plain(text: str) -> str:
    """Escape Markdown: a description is text."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", text)
