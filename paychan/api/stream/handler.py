"""The payment stream: `GET /v2/channels/{txid}/{vout}/stream`, upgraded to WebSocket.

    handler (Tornado: the upgrade request) ──▶ api.transport (moves the socket) ──▶ reader (frames, in `turns`)
                                                                                        └──▶ session (payments)

The client names the channel's secret in the request or in its first message. Until then the stream is in the waiting
room (`stream_slots`), and only that message is allowed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from paychan.api.responses import OUTPOINT, outpoint
from paychan.api.service import Service
from paychan.api.stream.reader import WebSocket
from paychan.api.stream.session import StreamSession
from paychan.api.stream.websocket import GOING_AWAY, accept_head, upgrade_problem
from paychan.api.transport import take_over
from paychan.api.v2 import V2Handler, find_channel
from paychan.protocol.errors import Malformed

_FRAME_FACTOR = 16
"""Largest frame, in units of `http.max_body_bytes`."""

_STOP_SECONDS = 2.0
"""Time that clients have to close when the server stops."""


class StreamHandler(V2Handler):
    """Handles the request that begins a stream."""

    async def get(self, txid: str, vout: str) -> None:
        """Upgrade to WebSocket.

        A secret in the request is checked before; one in the first message is checked by the session.
        """
        named, service = outpoint(txid, vout), self.service
        problem = upgrade_problem(self.request.headers)
        if problem is not None:
            field, _, reason = problem.partition(": ")
            raise Malformed(field=field, reason=reason)
        session = StreamSession(service, named, self.request.remote_ip or "", self.url)
        websocket = WebSocket(
            session,
            service.turns,
            service.config.http.max_body_bytes * _FRAME_FACTOR,
            service.config.stream.ping_seconds,
        )
        session.websocket, session.holder = websocket, self.holder
        self.holder.evictor = websocket.abort
        if arguments := self._secret():
            session.begin(await find_channel(service, named, arguments))
        else:
            session.wait()
            self.holder.end_work()
        head = accept_head(self.request.headers["Sec-WebSocket-Key"])
        try:
            began = await take_over(self.detach(), websocket, head)
        except BaseException:
            websocket.abort()
            raise
        if not began:
            websocket.abort()

    def _secret(self) -> Mapping[str, Sequence[bytes]]:
        """Return the secret of the header `Authorization: Bearer …`, else the query."""
        scheme, _, secret = self.request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return {"secret": [secret.strip().encode("latin1")]}
        return self.request.query_arguments

    def detach(self) -> Any:
        """Detach the connection from Tornado; None if the client has disconnected."""
        return None if self.request.connection is None else super().detach()


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
