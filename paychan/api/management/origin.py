"""The check that no web page sends the operator's requests: `Host` names this listener, and no other site is the origin."""

from __future__ import annotations

from typing import Any

from tornado.httputil import HTTPServerRequest

from paychan.protocol.errors import CrossSite, Misdirected

_HTTP_PORT = 80


def check_origin(request: HTTPServerRequest, listen: str) -> None:
    """Refuse a request that a web page may have sent, and one of a connection that is gone.

    `listen` is the configured address of the listener.

    Raises:
        Misdirected: the connection is gone, or `Host` is not a name of this listener.
        CrossSite: the request comes from a page of another site.
    """
    connection: Any = request.connection
    if connection.stream.closed():
        raise Misdirected
    headers, allowed = request.headers, _own_hosts(connection.stream.socket.getsockname(), listen)
    if headers.get("Host", next(iter(allowed))).lower() not in allowed:
        raise Misdirected
    origin = headers.get("Origin", "")
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") or (
        origin and origin.lower().removeprefix("http://") not in allowed
    ):
        raise CrossSite


def _own_hosts(own_address: Any, listen: str) -> set[str]:
    """Return the allowed values of `Host`, each with the port.

    They are the local names, the configured address, and the address of this socket.
    """
    reached, port = own_address[:2]
    names = {"127.0.0.1", "localhost", "::1", listen.lower(), reached} - {""}
    shown = {f"[{name}]" if ":" in name else name for name in names}
    return {f"{name}:{port}" for name in shown} | (shown if port == _HTTP_PORT else set())
