"""A seller's service that costs next to nothing: one process that answers each request with the same small JSON.

    python bench/small_server.py

It prints its port, and serves until it is ended. It is the upstream of `gateway.py`, so that the cost of a proxied request
is the gateway's own.
"""

from __future__ import annotations

import asyncio
from typing import cast

import httptools
import uvloop

BODY = b'{"tile": "' + b"0123456789abcdef" * 8 + b'"}\n'
"""Ends as `rest.Client` expects."""

_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nServer: small\r\nDate: Mon, 30 Nov 2026 00:00:00 GMT\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class Connection(asyncio.Protocol):
    """One connection; `httptools` finds the ends of its requests."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answer (called by `httptools`)."""
        self._transport.write(_ANSWER)


async def serve() -> None:
    """Serve until the process ends."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
