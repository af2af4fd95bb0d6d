"""The two listeners: clients' and operator's. Limits apply before anything of a request is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from paychan.api import v1, v2
from paychan.api.budgets.connection_slots import Places
from paychan.api.fast.payments import PaymentProcessor
from paychan.api.fast.server import FastServer
from paychan.api.handler import NotFoundHandler
from paychan.api.limits import BACKLOG, BoundedServer
from paychan.api.management import handlers as management
from paychan.api.response_heads import laid_out
from paychan.api.responses import refusal
from paychan.api.service import Service
from paychan.api.stream import handler as stream
from paychan.memory import CHANNEL_BYTES, CONNECTION_BYTES
from paychan.protocol.errors import TooManyConnections

log = structlog.get_logger("access")

_HARD_BODY_FACTOR = 16
"""Tornado drops the connection without words at its limit, so ours, which explains itself, comes well before."""


def public_server(service: Service) -> BoundedServer:
    """Make the clients' listener; it does not listen yet."""
    http = service.config.http
    resources = [*v1.ROUTES, *v2.ROUTES, *stream.ROUTES, (r".*", NotFoundHandler)]
    routes = [(path, handler, {"service": service}) for path, handler in resources]
    memory = service.memory
    places = Places(service.descriptors.clients, "clients", memory.new_work)
    memory.taken = lambda: len(places) * CONNECTION_BYTES + service.registry.awake * CHANNEL_BYTES
    return _server(service, routes, places, xheaders=http.trust_forwarded, lane=True)


def management_server(service: Service, token: str) -> BoundedServer:
    """Make the operator's listener; it does not listen yet."""
    settings = {"service": service, "token": token}
    routes = [(path, handler, settings) for path, handler in management.ROUTES]
    places = Places(service.descriptors.management, "management")
    return _server(service, routes, places, xheaders=False, lane=False)


async def listen(server: BoundedServer, address: str, port: int) -> int:
    """Listen, and return the port (which the system chooses for 0). Raises `OSError` when it is taken."""
    sockets = bind_sockets(port, address, backlog=BACKLOG)
    await server.listen_on(sockets)
    return int(sockets[0].getsockname()[1])


def _server(service: Service, routes: Sequence[Any], places: Places, *, xheaders: bool, lane: bool) -> BoundedServer:
    http = service.config.http
    application = Application(
        list(routes),
        log_function=_log_request if service.config.log.access else _log_nothing,
    )
    kind = FastServer if lane and http.fast_lane and not service.config.log.access else BoundedServer
    is_lane = kind is FastServer  # there Tornado only reads what takes a detour, whose head has begun to come
    server: BoundedServer = kind(
        application,
        xheaders=xheaders,
        max_body_size=http.max_body_bytes * _HARD_BODY_FACTOR,
        max_buffer_size=http.max_body_bytes * _HARD_BODY_FACTOR + http.max_header_bytes,
        max_header_size=http.max_header_bytes,
        idle_connection_timeout=http.head_seconds if is_lane else http.idle_seconds,
        body_timeout=http.body_seconds,
    )
    server.places = places
    server.patience_seconds, server.head_seconds = http.idle_seconds, http.head_seconds
    server.refusal = laid_out(refusal(TooManyConnections(), quiet_404=False), closes=True)
    if isinstance(server, FastServer):
        server.processor, server.body_seconds = PaymentProcessor(service), http.body_seconds
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
