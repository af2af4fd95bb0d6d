"""The rarer forms of a request target (RFC 9112 3.2): with a scheme and host, and the asterisk."""

from __future__ import annotations

import re
from typing import Any

from tornado.httputil import HTTPInputError, HTTPServerRequest
from tornado.web import Application

from paychan.api.handler import Handler
from paychan.api.urls import is_host

_ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)


class AbsoluteTargets(Application):
    """An application that also serves requests whose target is an absolute URL.

    RFC 9112 3.2.2: "A server MUST accept the absolute-form in requests even though most HTTP/1.1 clients will only send the
    absolute-form to a proxy".
    """

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Find the handler. Raises `HTTPInputError`: the URL has no host, or one that can't be; Tornado answers 400."""
        absolute = _ABSOLUTE.fullmatch(request.path or "")
        if absolute is not None:
            host, path = absolute.groups()
            if not is_host(host):  # RFC 9110 4.2.1: an "http" URI "with an empty host identifier" is invalid
                msg = "Invalid host in the request target"
                raise HTTPInputError(msg)
            # RFC 9112 3.2.2: the server "MUST ignore the received Host header field (if any) and instead use the host
            # information of the request-target"
            request.headers["Host"] = request.host = host
            request.path = path or "/"
            request.uri = request.path + (f"?{request.query}" if request.query else "")
        return super().find_handler(request, **kwargs)


class OptionsOfAll(Handler):
    """`OPTIONS *` (RFC 9110 9.3.7): "a "ping" or "no-op" type of method"."""

    SUPPORTED_METHODS = ("OPTIONS",)

    def methods(self) -> list[str]:
        """Name the methods that some resource has."""
        return ["GET", "HEAD", "POST", "DELETE", "PUT", "OPTIONS"]


ROUTES: list[tuple[str, Any]] = [(r"\*", OptionsOfAll)]
