"""Requests and prices as the middleware sees them, free of a framework; headers that payers and sellers exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias
from urllib.parse import parse_qs

from msgspec import Struct, field

from paychan.protocol.saidprice import OVERRIDES_HEADER, PRICE_HEADER
from paychan.protocol.wire.merchant import FACT_HEADERS, PAYMENT_HEADERS, Unit

Headers: TypeAlias = list[tuple[str, str]]
"""Names in any case, values as they came."""

_PAYMENTS = ("payment-signature", "payment-authorization")
_OURS = "x-paychan-"
"""Prefix of the headers that only the gateway may set."""

_FORGED = ("payment-response", "payment-receipt", "payment-required", OVERRIDES_HEADER.lower(), PRICE_HEADER.lower())
"""Headers that a handler's answer does not take to the payer."""


class Request(Struct, frozen=True):
    """A payer's request, for a price that depends on it."""

    method: str
    url: str
    """As the payer sees it."""
    headers: Mapping[str, str]
    """First value of each name, names in lower case; without payments."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the handler: with most frameworks the parameters of the path."""

    @property
    def query(self) -> dict[str, list[str]]:
        """The parameters behind the question mark."""
        return parse_qs(self.url.partition("?")[2], keep_blank_values=True)


class Price(Struct, frozen=True):
    """Price of a request in satoshi; 0 is free.

    With `is_ceiling` it is the highest price: `charge` in the handler says what the request costs.
    """

    sat: int
    is_ceiling: bool = False
    unit: Unit = "request"
    """Word of the 402 for that which is sold: request, token, kilobyte and others."""
    realm: str = ""
    """Name of the service; "": the host of the request."""
    description: str = ""
    """One sentence for payers."""
    mime_type: str = ""


Priced: TypeAlias = int | Price | Callable[[Request], "int | Price"]
"""A price, or a function of the request that returns one."""


def price_of(priced: Priced, request: Request) -> Price:
    """Return the price of a request. Raises `ValueError`: it is no whole number of satoshi."""
    found = priced if isinstance(priced, int | Price) else priced(request)
    price = Price(found) if isinstance(found, int) else found
    if not isinstance(price, Price) or isinstance(price.sat, bool) or not isinstance(price.sat, int) or price.sat < 0:
        msg = f"a price is a whole number of satoshi, 0 or more, got {found!r}"
        raise ValueError(msg)
    return price


def is_payment(name: str, value: str) -> bool:
    """Say whether a header brings a payment; `name` in lower case."""
    return name in _PAYMENTS or (name == "authorization" and value.lstrip(" \t").lower().startswith("payment "))


def is_private(name: str, value: str) -> bool:
    """Say whether the handler must not see a header: a payment, or one that a payer forged. `name` in lower case."""
    return is_payment(name, value) or name.startswith(_OURS)


def told(headers: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the headers that the server needs for a charge and for a 402."""
    wanted = (*PAYMENT_HEADERS, *FACT_HEADERS)
    return tuple(
        (name.lower(), value)
        for name, value in headers
        if name.lower() in wanted and (name.lower() != "authorization" or is_payment("authorization", value))
    )


def first_values(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the first value of each header that the handler may see, names in lower case."""
    found: dict[str, str] = {}
    for name, value in headers:
        if not is_private(name.lower(), value):
            found.setdefault(name.lower(), value)
    return found


def said(headers: Iterable[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Return what an answer says about its price: `X-Paychan-Price` and `Settlement-Overrides`."""
    found = {name.lower(): value for name, value in headers}
    return found.get(PRICE_HEADER.lower()), found.get(OVERRIDES_HEADER.lower())


def for_payer(headers: Iterable[tuple[str, str]], added: Iterable[tuple[str, str]] = ()) -> Headers:
    """Return the headers of an answer without those that only we may set, with those added."""
    kept = [(name, value) for name, value in headers if name.lower() not in _FORGED]
    added = list(added)
    if not added:
        return kept
    caching = ",".join(value for name, value in kept if name.lower() == "cache-control").lower()
    if "no-store" not in caching and "private" not in caching:
        kept = [(name, value) for name, value in kept if name.lower() != "cache-control"]
        kept.append(("Cache-Control", "private"))
    return [*kept, *added]
