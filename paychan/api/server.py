"""The two listeners: one for clients, one for the operator. Limits apply before any part of a request is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from tornado.netutil import bind_sockets
from tornado.web import RequestHandler

from paychan.api import readiness, targets, v1, v2
from paychan.api.budgets.connection_slots import ConnectionSlots
from paychan.api.fast.payments import PaymentProcessor
from paychan.api.fast.server import FastServer
from paychan.api.handler import NotFoundHandler
from paychan.api.limits import BACKLOG, BoundedServer
from paychan.api.management import handlers as management
from paychan.api.service import Service
from paychan.api.stream import handler as stream
from paychan.memory import CHANNEL_BYTES, CONNECTION_BYTES

log = structlog.get_logger("access")

_HARD_BODY_FACTOR = 16
"""Tornado's body limit, in units of `http.max_body_bytes`. At its limit Tornado closes the connection without an
answer; bodies between the two limits get an answer that explains the refusal."""


def public_server(service: Service) -> BoundedServer:
    """Make the listener for clients; call `listen` to start it."""
    resources = [*v1.ROUTES, *v2.ROUTES, *stream.ROUTES, *readiness.ROUTES, *targets.ROUTES, (r".*", NotFoundHandler)]
    routes = [(path, handler, {"service": service}) for path, handler in resources]
    memory = service.memory
    slots = ConnectionSlots(service.descriptors.clients, "clients", memory.new_work)
    memory.taken = lambda: len(slots) * CONNECTION_BYTES + service.registry.awake * CHANNEL_BYTES
    return _server(service, routes, slots, fast=True)


def management_server(service: Service, token: str) -> BoundedServer:
    """Make the listener for the operator; call `listen` to start it."""
    settings = {"service": service, "token": token}
    routes = [(path, handler, settings) for path, handler in management.ROUTES]
    slots = ConnectionSlots(service.descriptors.management, "management")
    return _server(service, routes, slots, fast=False)


async def listen(server: BoundedServer, address: str, port: int) -> int:
    """Start to listen and return the port; the system chooses one for port 0. Raises `OSError`: the port is in use."""
    sockets = bind_sockets(port, address, backlog=BACKLOG)
    await server.listen_on(sockets)
    return int(sockets[0].getsockname()[1])


def _server(service: Service, routes: Sequence[Any], slots: ConnectionSlots, *, fast: bool) -> BoundedServer:
    http = service.config.http
    application = targets.AbsoluteTargets(
        list(routes),
        log_function=_log_request if service.config.log.access else _log_nothing,
    )
    server: BoundedServer = (FastServer if fast else BoundedServer)(
        application,
        max_body_size=http.max_body_bytes * _HARD_BODY_FACTOR,
        max_buffer_size=http.max_body_bytes * _HARD_BODY_FACTOR + http.max_header_bytes,
        max_header_size=http.max_header_bytes,
        # of the fast server, Tornado reads only requests whose head has arrived
        idle_connection_timeout=http.head_seconds if fast else http.idle_seconds,
        body_timeout=http.body_seconds,
    )
    server.slots = slots
    server.patience_seconds, server.head_seconds = http.idle_seconds, http.head_seconds
    if isinstance(server, FastServer):
        server.processor, server.body_seconds = PaymentProcessor(service), http.body_seconds
        server.takes_payments = http.fast_lane and not service.config.log.access
    return server


def _log_request(handler: RequestHandler) -> None:
    """Log a request without its query, which contains secrets and payments."""
    request = handler.request
    log.info(
        "request",
        method=request.method,
        path=request.path,
        status=handler.get_status(),
        ms=round(1000 * request.request_time(), 2),
    )


def _log_nothing(handler: RequestHandler) -> None:
    """Log nothing: a line per payment would be too many."""
