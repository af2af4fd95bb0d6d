"""A flood of new connections: how many are accepted and served in one turn of the event loop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from paychan.api.budgets.connection_slots import ConnectionSlots
from paychan.api.limits import BoundedServer

_CLIENTS = 12


async def test_fault_60_one_request_begins_in_a_turn_without_the_fast_path() -> None:
    """In one turn at most two connections are accepted and one request begins, on new connections and on open ones."""
    served: list[int] = []

    class Handler(RequestHandler):
        def get(self) -> None:
            served.append(1)

    server: Any = BoundedServer(Application([(r".*", Handler)]))
    server.slots, server.patience_seconds, server.head_seconds = ConnectionSlots(100, "test"), 10, 10
    sockets = bind_sockets(0, "127.0.0.1")
    await server.listen_on(sockets)
    clients = [socket.create_connection(sockets[0].getsockname()) for _ in range(_CLIENTS)]
    try:
        for _ in range(2):  # on new connections, then on the same ones
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            served.clear()
            while len(served) < _CLIENTS:
                before, open_before = len(served), len(server.slots)
                await asyncio.sleep(0)
                assert len(server.slots) - open_before <= 2
                assert len(served) - before <= 1
    finally:
        for client in clients:
            client.close()
        server.stop()
        await server.close_all_connections()
