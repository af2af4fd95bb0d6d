"""Absolute URLs for `Location`: on the configured public base, else on the address that the client used."""

from __future__ import annotations

import re
from typing import Any

from tornado.httputil import HTTPHeaders

from paychan.config import Http

_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")


def absolute(http: Http, protocol: str, headers: HTTPHeaders, own_address: Any, path: str) -> str:
    """Build the URL of a path for the client that sent `headers` to `own_address` (None: the connection is gone)."""
    if http.public_url:
        return http.public_url.rstrip("/") + path
    names = ("X-Forwarded-Host", "Host") if http.trust_forwarded else ("Host",)
    hosts = (headers.get(name, "") for name in names)
    host = next(filter(_HOST.fullmatch, hosts), None) or _shown(own_address)
    return f"{protocol}://{host}{path}"


def forwarded_protocol(headers: HTTPHeaders) -> str:
    """Return the protocol of the client's request to a trusted proxy, from the same headers that Tornado reads."""
    named = headers.get("X-Scheme", headers.get("X-Forwarded-Proto", "http")).split(",")[-1].strip()
    return named if named in ("http", "https") else "http"


def _shown(address: Any) -> str:
    """Return address and port at which the request arrived. For a closed connection any text is good enough."""
    if address is None:
        return "localhost"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
