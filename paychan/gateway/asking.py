"""The parts of a request that its 402 answer depends on."""

from __future__ import annotations

import re
from functools import lru_cache

from msgspec import Struct

from paychan.protocol.errors import Malformed
from paychan.protocol.wire.mpp import INTENT, METHOD

_HOST = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_ZERO = re.compile(r"0(?:\.0{0,3})?")
_SCHEMES = ("http", "https")

_LONGEST_ACCEPT = 1000
"""A longer Accept or Accept-Payment is ignored."""


class Facts(Struct, frozen=True):
    """Facts of a request.

    Raises:
        Malformed: no host can have the name in the Host header, or the scheme is none of HTTP.
    """

    method: str
    host: str
    """The Host header."""
    target: str
    """Path and query, as the client wrote them."""
    scheme: str = "http"
    """`https` behind a proxy that ends TLS."""
    accept: str = ""
    accept_payment: str = ""

    def __post_init__(self) -> None:
        """Refuse a host or scheme that would make a wrong URL."""
        if not _HOST.fullmatch(self.host):
            raise Malformed(field="host", reason="want a host name or address, and at most a port")
        if self.scheme not in _SCHEMES:
            raise Malformed(field="scheme", reason="want http or https")

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}{self.target}"


def wants_page(asked: Facts) -> bool:
    """Return whether a person reads the answer: a GET or HEAD whose Accept names text/html."""
    return asked.method in ("GET", "HEAD") and "html" in asked.accept and _names_html(asked.accept)


@lru_cache(256)
def _names_html(accept: str) -> bool:
    return any(name == "text/html" and is_taken for name, is_taken in _ranges(accept))


@lru_cache(256)
def takes_mpp(accept_payment: str) -> bool:
    """Return whether Accept-Payment leaves MPP's method in: its most special range that matches has no weight of 0.

    A header that names other methods only says what the payer prefers, and refuses nothing.
    """
    ranges = dict(_ranges(accept_payment))
    for name in (f"{METHOD}/{INTENT}", f"{METHOD}/*", f"*/{INTENT}", "*/*"):
        if name in ranges:
            return ranges[name]
    return True


def _ranges(text: str) -> list[tuple[str, bool]]:
    """Read a list of ranges, each with whether it is taken: its parameter `q` is not 0 (RFC 9110, 12.4.2)."""
    found = []
    for part in text.split(",") if len(text) <= _LONGEST_ACCEPT else ():
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        pairs = (parameter.partition("=") for parameter in parameters)
        found.append((name, not any(key.strip() == "q" and _ZERO.fullmatch(value.strip()) for key, _, value in pairs)))
    return found
