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
from paychan.api.management.origin import check_origin
from paychan.api.responses import HEADERS, Answer, refusal
from paychan.config import ServerConfig
from paychan.protocol.errors import PaychanError
from paychan.shared.holders import cannot_listen

_SLOTS = 16
_SECONDS = 10


class _Handler(RequestHandler):
    """Refuses a request of a client."""

    def initialize(self, error: PaychanError, **_unused: object) -> None:
        self._error = error

    def prepare(self) -> None:
        for name, value in self.headers().items():
            self.set_header(name, value)
        answer = self.refused()
        self.set_status(answer.status, answer.reason)
        for name, value in answer.headers:
            self.set_header(name, value)
        self.finish(answer.body)

    def headers(self) -> dict[str, str]:
        return HEADERS

    def refused(self) -> Answer:
        """Make the answer, with the text that clients may read."""
        return refusal(self._error, quiet_404=False)


class _ManagementHandler(_Handler):
    """Refuses a request of the operator, in the form of `/health`."""

    def initialize(self, error: PaychanError, kind: Kind, listen: str) -> None:  # type: ignore[override]
        super().initialize(error)
        self._kind, self._listen = kind, listen

    def headers(self) -> dict[str, str]:
        """Name no CORS header: web pages must not use the operator's interface."""
        return {name: HEADERS[name] for name in ("Server", "Content-Type", "Cache-Control")}

    def refused(self) -> Answer:
        """Make the answer. Pages of other sites get no reason, which the token can't protect without a store."""
        try:
            check_origin(self.request, self._listen)
        except PaychanError as error:
            return refusal(error, quiet_404=False)
        text, answer = str(self._error), refusal(self._error, quiet_404=False, to_operator=True)
        alarm = {"kind": self._kind.value, "text": text, "channel": ""}
        said = {"code": self._error.code, "error": text, "error_msg": text, "frozen": [text], "alarms": [alarm]}
        return Answer(answer.status, answer.reason, msgspec.json.encode(said), answer.headers)


@asynccontextmanager
async def waiting_room(config: ServerConfig, error: PaychanError, kind: Kind) -> AsyncIterator[None]:
    """Answer every request with this error, and `/health` with an alarm of this kind, while the context is open.

    Raises:
        OSError: a port can't be used; `strerror` says which one, and which process holds it.
    """
    listeners = (
        (config.http.listen, config.port, "http.port (or PORT)", _Handler),
        (config.management.listen, config.management.port, "management.port", _ManagementHandler),
    )
    servers = []
    try:
        for address, port, key, handler in listeners:
            application = Application([(r".*", handler, {"error": error, "kind": kind, "listen": address})])
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
