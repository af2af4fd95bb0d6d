"""Checks of the URLs, hosts and ports that an operator or payer sets: each answer says what is expected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
"""A host name. Some networks use the underscore, which RFC 952 does not allow."""

_ADDRESS_LIKE = re.compile(r"[0-9.]*\.[0-9.]*")
"""Numbers with dots, such as 300.1.1.1: no name, but a mistyped IPv4 address."""


def _is_host(text: str) -> bool:
    """Return whether a text is a host name, or an address of IPv4 or IPv6 without brackets."""
    try:
        ip_address(text)
    except ValueError:
        return _NAME.fullmatch(text) is not None and _ADDRESS_LIKE.fullmatch(text) is None
    return True


def is_loopback(host: str) -> bool:
    """Say whether a host name or an address means this machine itself: localhost, 127.0.0.1, ::1."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def url_trouble(
    url: str, schemes: Sequence[str], *, needs_port: bool = False, path: bool = False, query: bool = False
) -> str:
    """Return what is wrong with a URL of one of these schemes; "" if nothing is.

    Args:
        url: the text that was set.
        schemes: the allowed schemes, the usual one first.
        needs_port: whether the scheme has no port of its own.
        path: whether a path is allowed.
        query: whether a query is allowed.
    """
    port = ":port" if needs_port else "[:port]"
    want = "want " + " or ".join(f"{scheme}://host{port}" for scheme in schemes)
    try:
        parts = urlsplit(url)
        number, host = parts.port, parts.hostname or ""
    except ValueError:
        return want
    if parts.scheme not in schemes or not _is_host(host) or (number is None and needs_port):
        return want
    if (parts.path not in ("", "/") and not path) or (parts.query and not query) or parts.fragment or " " in url:
        return f"{want}, then {'a path and a query' if query else 'at most a path' if path else 'nothing'}"
    return ""


def host_trouble(address: str) -> str:
    """Return what is wrong with the address of a listener; "" if nothing is.

    An empty address would be every address of the machine: it must be written out.
    """
    if _is_host(address):
        return ""
    return "want the address of an interface, such as 127.0.0.1, 0.0.0.0, ::1 or ::, without port and brackets"


def port_trouble(text: str) -> str:
    """Return what is wrong with a port number in text; "" if nothing is."""
    good = text.isascii() and text.isdigit() and int(text) < 65536
    return "" if good else "want a port number, 0 to 65535"
