"""The payment stream: `GET /v2/channels/{txid}/{vout}/stream`, upgraded to WebSocket.

    connection ──▶ upgrade (the request) ──▶ reader (frames, in `turns`) ──▶ session (payments)
                         └─ any other request to this path ──▶ handler (Tornado), which refuses it

The client names the channel's secret in the request or in its first message. Until then the stream is in the waiting
room (`stream_slots`), and only that message is allowed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from paychan.api.responses import OUTPOINT, outpoint
from paychan.api.service import Service
from paychan.api.stream.websocket import GOING_AWAY, upgrade_problem
from paychan.api.v2 import V2Handler
from paychan.protocol.errors import Malformed

_STOP_SECONDS = 2.0
"""Time that clients have to close when the server stops."""


class StreamHandler(V2Handler):
    """Refuses the requests that can't begin a stream; the others do not reach Tornado."""

    SUPPORTED_METHODS = ("GET", "OPTIONS")

    async def get(self, txid: str, vout: str) -> None:
        """Say what is wrong with the request."""
        outpoint(txid, vout)
        problem = upgrade_problem(self.request.headers) or "request: want HTTP/1.1, one Host and no body"
        field, _, reason = problem.partition(": ")
        raise Malformed(field=field, reason=reason)


async def close_all(service: Service) -> None:
    """Close every stream because the server stops; abort those that do not close in time."""
    streams = service.streams.all
    for stream in streams:
        stream.close(GOING_AWAY, "server stops")
    with suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            while not all(stream.is_gone for stream in streams):  # noqa: ASYNC110 - an event for each costs more
                await asyncio.sleep(0.01)
    for stream in streams:
        stream.abort()


ROUTES: list[tuple[str, Any]] = [(rf"/v2/channels/{OUTPOINT}/stream", StreamHandler)]
