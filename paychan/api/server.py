"""The two listeners: clients' and operator's. Limits apply before anything of a request is kept."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Sequence
from time import monotonic
from typing import Any

import structlog
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from paychan.api import management, v1, v2
from paychan.api.handler import NotFoundHandler
from paychan.api.payments import PaymentLane
from paychan.api.service import Service

log = structlog.get_logger("access")

_HARD_BODY_FACTOR = 16
"""Tornado drops the connection without words at its limit, so ours, which explains itself, comes well before."""

_WARNING_SECONDS = 60


class BoundedServer(HTTPServer):
    """Keeps only so many connections, and closes a further one at once, and one that takes no answers.

    Without a bound idle connections take every file the process may open: then accepting fails in a loop that fills the
    log, and the store, which needs files too, stops the process.
    """

    max_connections = 0
    patience_seconds = 0
    sweeper: asyncio.Task[None] | None = None
    _open = 0
    _warned_at = float("-inf")

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        if self._open < self.max_connections:
            self._open += 1
            # Tornado waits for ever for a client that takes no answer; the kernel does not wait for acknowledgements
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * self.patience_seconds)
            # one switch for good: Tornado would turn Nagle's algorithm on and off around every answer
            stream.set_nodelay(True)
            stream.set_nodelay = _no_more  # type: ignore[method-assign]
            super().handle_stream(stream, address)
            return
        stream.close()
        if monotonic() - self._warned_at >= _WARNING_SECONDS:
            self._warned_at = monotonic()
            log.warning("all connections are taken, closing new ones", open=self._open)

    def stop(self) -> None:
        if self.sweeper is not None:
            self.sweeper.cancel()
        super().stop()

    def on_close(self, server_conn: object) -> None:
        self._open -= 1
        super().on_close(server_conn)


def _no_more(value: bool) -> None:
    """Answers leave in one piece; there is nothing to gather."""


def public_server(service: Service) -> HTTPServer:
    """Make the clients' listener; it does not listen yet."""
    http = service.config.http
    resources = [*v1.ROUTES, *v2.ROUTES, (r".*", NotFoundHandler)]
    routes = [(path, handler, {"service": service}) for path, handler in resources]
    return _server(service, routes, xheaders=http.trust_forwarded, lane=True)


def management_server(service: Service, token: str) -> HTTPServer:
    """Make the operator's listener; it does not listen yet."""
    settings = {"service": service, "token": token}
    return _server(
        service, [(path, handler, settings) for path, handler in management.ROUTES], xheaders=False, lane=False
    )


def listen(server: HTTPServer, address: str, port: int) -> int:
    """Listen, and return the port (which the system chooses for 0). Raises `OSError` when it is taken."""
    sockets = bind_sockets(port, address)
    server.add_sockets(sockets)
    return int(sockets[0].getsockname()[1])


def _server(service: Service, routes: Sequence[Any], *, xheaders: bool, lane: bool) -> HTTPServer:
    http = service.config.http
    application = Application(
        list(routes),
        log_function=_log_request if service.config.log.access else _log_nothing,
    )
    payments = None
    if lane and http.fast_lane and not service.config.log.access:
        payments = PaymentLane(service, application)
    server = BoundedServer(
        payments or application,
        xheaders=xheaders,
        max_body_size=http.max_body_bytes * _HARD_BODY_FACTOR,
        max_buffer_size=http.max_body_bytes * _HARD_BODY_FACTOR + http.max_header_bytes,
        max_header_size=http.max_header_bytes,
        idle_connection_timeout=http.idle_seconds,
        body_timeout=http.body_seconds,
    )
    server.max_connections = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2  # the other half is the store's
    server.patience_seconds = http.idle_seconds
    if payments is not None:
        server.conn_params.header_timeout = None
        server.sweeper = asyncio.get_running_loop().create_task(payments.close_idle(http.idle_seconds))
    return server


def _log_request(handler: RequestHandler) -> None:
    """The path without its query: that holds secrets and payments."""
    request = handler.request
    log.info(
        "request",
        method=request.method,
        path=request.path,
        status=handler.get_status(),
        ms=round(1000 * request.request_time(), 2),
    )


def _log_nothing(handler: RequestHandler) -> None:
    """Counters instead of a line per payment."""
