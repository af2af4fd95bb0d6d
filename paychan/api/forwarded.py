"""Headers in which proxies name a client's request: its address, scheme, host and path prefix.

The caller asks only when the operator trusts these headers (`http.trust_forwarded`), because any client can send them.
Two families are known: `X-Forwarded-…` with `X-Real-Ip` and `X-Scheme`, and `Forwarded` (RFC 7239). `Forwarded` counts only
in a request without the first family: a proxy sets one family, and may pass on a client's headers of the other.

Each proxy of a row may add to a list. The first entry of scheme, host and port is what the client saw. The last entry of
the addresses is the one that a trusted proxy saw itself; proxies on this machine (loopback addresses) are passed over.
`X-Real-Ip` counts only in a request without `X-Forwarded-For`, as most proxies set the latter and pass on the former.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address

import structlog
from tornado.httputil import HTTPHeaders

log = structlog.get_logger("api")

_FAMILY = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Real-Ip", "X-Scheme")
_NAMES = (*_FAMILY, "X-Forwarded-Prefix", "Forwarded")

_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
"""Traefik names the schemes of WebSockets, too."""

_PAIR = re.compile(r'[ \t]*(?:([\w!#$%&\'*+.^`|~-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;,"]+)))?[ \t]*([;,]|\Z)', re.ASCII)
"""One pair of RFC 7239 4: `forwarded-pair = token "=" value`, `value = token / quoted-string`. Unlike there, a value
without quotes may have a colon, as some proxies write ports."""

_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)*/?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_LOOPBACK = "loopback"


def protocol(headers: HTTPHeaders) -> str:
    """Return the scheme of the client's request, `http` if no header names a known one."""
    named = _first(headers.get("X-Scheme") or headers.get("X-Forwarded-Proto") or _element(headers, "proto"))
    return _SCHEMES.get(named.lower(), "http")


def host(headers: HTTPHeaders) -> str:
    """Return the host that the client named, with its port if there was one; "" if no header says it. Not checked."""
    return _first(headers.get("X-Forwarded-Host") or _element(headers, "host"))


def port(headers: HTTPHeaders) -> str:
    """Return the port that the client used, in digits; "" if no header says it."""
    named = _first(headers.get("X-Forwarded-Port", ""))
    return named if _PORT.fullmatch(named) else ""


def prefix(headers: HTTPHeaders) -> str:
    """Return the path prefix that proxies removed, without a slash at its end.

    Each proxy that removes a prefix adds it to the list, so the client saw all of them, one after the other.
    """
    parts = [part.strip() for part in headers.get("X-Forwarded-Prefix", "").split(",")]
    return "".join(part.rstrip("/") for part in parts) if all(map(_PREFIX.fullmatch, parts)) else ""


def address(headers: HTTPHeaders, peer: str) -> str:
    """Return the IP address of the client; `peer`, the address of the nearest proxy, if no header names one."""
    lists = headers.get("X-Forwarded-For", headers.get("X-Real-Ip", "")).split(",")
    if not _has_family(headers):
        lists = [element.get("for", "") for element in _elements(headers.get("Forwarded", ""))]
    for named in reversed(lists):
        found = _address(named)
        if found != _LOOPBACK:
            return found or peer
    return peer


class Unbelieved:
    """Warns once when a request has forwarded headers that the server does not believe."""

    def __init__(self, *, trusts: bool) -> None:
        self._is_quiet = trusts

    def look(self, headers: HTTPHeaders) -> None:
        """Look at the headers of a request that does not take the fast path; each client sends such a request."""
        if self._is_quiet:
            return
        found = [name for name in _NAMES if name in headers]
        if found:
            self._is_quiet = True
            log.warning(
                "requests have headers of a proxy, and the server ignores them: URLs in answers may be wrong, and all "
                "clients of the proxy share one address. If a proxy of yours sets them, set http.trust_forwarded = true",
                headers=found,
            )


def _first(value: str) -> str:
    return value.partition(",")[0].strip()


def _has_family(headers: HTTPHeaders) -> bool:
    return any(name in headers for name in _FAMILY)


def _element(headers: HTTPHeaders, name: str) -> str:
    """Return the first value of a parameter of `Forwarded`, if that header counts."""
    elements: Iterable[dict[str, str]] = [] if _has_family(headers) else _elements(headers.get("Forwarded", ""))
    return next((element[name] for element in elements if name in element), "")


def _elements(value: str) -> list[dict[str, str]]:
    """Parse `Forwarded` (RFC 7239 4); an unreadable header has no element. Names are in lower case."""
    elements: list[dict[str, str]] = [{}]
    at = 0
    while at < len(value):
        pair = _PAIR.match(value, at)
        if pair is None:
            return []
        if pair[1]:
            elements[-1][pair[1].lower()] = re.sub(r"\\(.)", r"\1", pair[2]) if pair[3] is None else pair[3]
        if pair[4] == ",":
            elements.append({})
        at = pair.end()
    return elements


def _address(named: str) -> str:
    """Read an address, with or without port and brackets: "" if it is none, `_LOOPBACK` for one of this machine."""
    text = named.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text)
    except ValueError:
        return ""
    found = (found.ipv4_mapped if isinstance(found, IPv6Address) else None) or found
    return _LOOPBACK if found.is_loopback else str(found)
