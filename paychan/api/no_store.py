"""Answers 503 with the reason on both ports while the server has no store: the disk is full, or the store is rebuilt."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from actors.alarm import Kind
from paychan.api.budgets.connection_slots import ConnectionSlots
from paychan.api.limits import BoundedServer
from paychan.config import ServerConfig
from paychan.protocol.errors import PaychanError
from paychan.shared.holders import cannot_listen

_RETRY_AFTER_SECONDS = 5
_SLOTS = 16
_SECONDS = 10


class _Handler(RequestHandler):
    def initialize(self, error: PaychanError, kind: Kind) -> None:
        self._error, self._kind = error, kind

    def prepare(self) -> None:
        self.set_status(self._error.http_status)
        self.set_header("Server", "paychan")
        self.set_header("Retry-After", str(_RETRY_AFTER_SECONDS))
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "application/json")
        text = str(self._error)
        alarm = {"kind": self._kind.value, "text": text, "channel": "", "critical": True}
        said = {"code": self._error.code, "error": text, "error_msg": text, "frozen": [text], "alarms": [alarm]}
        said["status"] = "critical"
        self.finish(msgspec.json.encode(said))


@asynccontextmanager
async def waiting_room(config: ServerConfig, error: PaychanError, kind: Kind) -> AsyncIterator[None]:
    """Answer every request with this error, and `/health` with an alarm of this kind, while the context is open.

    Raises:
        OSError: a port can't be used; `strerror` says which one, and which process holds it.
    """
    listeners = (
        (config.http.listen, config.port, "http.port (or PORT)"),
        (config.management.listen, config.management.port, "management.port"),
    )
    servers = []
    try:
        for address, port, key in listeners:
            application = Application([(r".*", _Handler, {"error": error, "kind": kind})])
            server = BoundedServer(application, max_body_size=65_536, idle_connection_timeout=_SECONDS)
            server.slots, server.patience_seconds, server.head_seconds = (
                ConnectionSlots(_SLOTS, "waiting", full=error),
                _SECONDS,
                _SECONDS,
            )
            servers.append(server)
            try:
                await server.listen_on(bind_sockets(port, address))
            except OSError as problem:
                raise OSError(problem.errno, cannot_listen(problem, address, port, key)) from problem
        yield
    finally:
        for server in servers:
            server.stop()
            await server.close_all_connections()
