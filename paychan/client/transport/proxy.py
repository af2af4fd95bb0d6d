"""The proxy for a URL, from the environment: requests and streams take the same way.

`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` are read as curl reads them: a proxy without a scheme is an HTTP
proxy; an entry of `NO_PROXY` is `*`, a host, a domain with its subdomains, an address (IPv6 with or without brackets)
or a network in CIDR notation, each with an optional port. A SOCKS proxy needs the packages of `paychan[socks]`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from paychan.client.errors import ProxyUnusable
from paychan.shared.tls import without_authorities

_PORTS = {"http": 80, "https": 443}


def proxy_of(url: str) -> str | None:
    """Return the URL of the proxy for an http or https URL; None for a direct connection."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
    if not proxy or any(_matches(entry, host, port) for entry in proxies.get("no", "").split(",")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _matches(entry: str, host: str, port: int) -> bool:
    """Say whether an entry of `NO_PROXY` names this host, which is in lower case, and this port."""
    entry = entry.strip().lower()
    if entry == "*":
        return True
    name, number = _split_port(entry)
    if not name or number not in ("", str(port)):
        return False
    try:
        address = ip_address(host)
    except ValueError:
        return host == name.lstrip(".") or host.endswith("." + name.lstrip("."))
    try:
        return address in ip_network(name, strict=False)
    except ValueError:
        return False


def _split_port(entry: str) -> tuple[str, str]:
    """Split `host:port`, `[address]:port`, or an address of IPv6 without brackets, which has no port."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name + (rest if rest.startswith("/") else ""), rest.removeprefix(":") if rest.startswith(":") else ""
    if entry.count(":") != 1:
        return entry, ""
    name, _, number = entry.partition(":")
    return name, number


class _Ways:
    """The proxy of each server that was asked, and the settings of TLS, which `tls` reads for the first https URL."""

    def __init__(self, tls: Callable[[], ssl.SSLContext]) -> None:
        self._tls = tls
        self._proxies: dict[tuple[str, str, int | None], str | None] = {}

    def _proxy(self, url: httpx.URL) -> str | None:
        server = (url.scheme, url.host, url.port)
        if server not in self._proxies:
            self._proxies[server] = proxy_of(str(url))
        return self._proxies[server]

    def _settings(self, url: httpx.URL) -> ssl.SSLContext:
        return self._tls() if url.scheme == "https" else without_authorities()


class ProxyTransport(_Ways, httpx.BaseTransport):
    """Sends each request directly or through the proxy that the environment names for its server."""

    @cached_property
    def _transports(self) -> dict[tuple[str, str | None], httpx.HTTPTransport]:
        return {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request.

        Raises:
            ProxyUnusable: the proxy's URL is malformed, or its kind needs a package that is missing.
        """
        proxy = self._proxy(request.url)
        way = (request.url.scheme, proxy)
        with _sentences(proxy):
            if way not in self._transports:
                self._transports[way] = httpx.HTTPTransport(verify=self._settings(request.url), proxy=proxy)
            return self._transports[way].handle_request(request)

    def close(self) -> None:
        for each in self._transports.values():
            each.close()


class AsyncProxyTransport(_Ways, httpx.AsyncBaseTransport):
    """Does what `ProxyTransport` does, with coroutines."""

    @cached_property
    def _transports(self) -> dict[tuple[str, str | None], httpx.AsyncHTTPTransport]:
        return {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        proxy = self._proxy(request.url)
        way = (request.url.scheme, proxy)
        with _sentences(proxy):
            if way not in self._transports:
                self._transports[way] = httpx.AsyncHTTPTransport(verify=self._settings(request.url), proxy=proxy)
            return await self._transports[way].handle_async_request(request)

    async def aclose(self) -> None:
        for each in self._transports.values():
            await each.aclose()


@contextmanager
def _sentences(proxy: str | None) -> Iterator[None]:
    """Name the proxy in errors, without the password in its URL."""
    if proxy is None:
        yield
        return
    scheme, mark, rest = proxy.partition("://")
    shown = f"{scheme}{mark}{rest.rpartition('@')[2]}"
    try:
        if urlsplit(proxy).hostname:
            yield
            return
    except ImportError:
        reason = "pip install 'paychan[socks]' installs what it needs"
        raise ProxyUnusable(proxy=shown, reason=reason) from None
    except (ValueError, httpx.InvalidURL) as error:
        raise ProxyUnusable(proxy=shown, reason=str(error).replace(proxy, shown)) from None
    except httpx.TransportError as error:
        raise type(error)(f"through the proxy {shown}: {error}".replace(proxy, shown)) from None
    raise ProxyUnusable(proxy=shown, reason="it names no host")
