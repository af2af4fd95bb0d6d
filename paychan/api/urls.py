"""Absolute URLs for `Location`: on the configured public base, else on the address that the client used."""

from __future__ import annotations

import re
from typing import Any

from tornado.httputil import HTTPHeaders

from paychan.api import forwarded
from paychan.config import Http

_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def absolute(http: Http, headers: HTTPHeaders, own_address: Any, path: str) -> str:
    """Build the URL of a path for the client that sent `headers` to `own_address` (None: the connection is gone)."""
    if http.public_url:
        return http.public_url.rstrip("/") + path
    if not http.trust_forwarded:
        return f"http://{_host(headers.get('Host', ''), own_address)}{path}"
    scheme, named, port = forwarded.protocol(headers), forwarded.host(headers), forwarded.port(headers)
    host = named if is_host(named) else _host(headers.get("Host", ""), own_address)
    has_port = ":" in host.rpartition("]")[2]
    if port and not has_port and port != _DEFAULT_PORTS[scheme]:
        host += f":{port}"
    return f"{scheme}://{host}{forwarded.prefix(headers)}{path}"


def is_host(text: str) -> bool:
    """Return whether a text is a host name or address, with or without a port."""
    return _HOST.fullmatch(text) is not None


def _host(named: str, own_address: Any) -> str:
    return named if is_host(named) else _shown(own_address)


def _shown(address: Any) -> str:
    """Return address and port at which the request arrived. For a closed connection any text is good enough."""
    if address is None:
        return "localhost"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
