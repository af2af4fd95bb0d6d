"""TLS of HTTP clients: certificates of authorities are read only if a connection needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


def verification(url: str) -> ssl.SSLContext | bool:
    """Return httpx's argument `verify` for a client of one URL: True, or for plain HTTP a context without authorities.

    httpx would read all authorities for every client, which takes 20 ms.
    """
    return without_authorities() if url.startswith("http://") else True


def without_authorities() -> ssl.SSLContext:
    """Return settings with which every TLS connection fails, for clients that make none."""
    import ssl  # noqa: PLC0415 - commands import this module for a help text

    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
