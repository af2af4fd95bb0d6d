"""The payment stream: `GET /v2/channels/{txid}/{vout}/stream`, upgraded to WebSocket.

Payments come in frames, answers leave in their order. Frames that have arrived by the time the loop gets to them are
given to the channel together. How many payments may be on their way is bounded: beyond that nothing more is read, so a
client that sends faster waits on its own socket.

A stream that ends because of an error has the close code 4000 + the error's HTTP status, and its code as the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import msgspec
import structlog
from msgspec import Struct
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from paychan.api.answers import OUTPOINT, outpoint, until_404s_leave
from paychan.api.service import Service
from paychan.api.streamframes import Answers, Frame, ends, read_frame
from paychan.api.v2 import V2Handler, find_channel
from paychan.protocol.channel import Channel, Outcome, Pay, Rejected
from paychan.protocol.errors import InternalError, Malformed, PaychanError, TooManyStreams, UnknownChannel
from paychan.protocol.stream import MAX_FRAME_PAYMENTS

log = structlog.get_logger("stream")

CLOSE_CODES = 4000
"""An error's close code is this and its HTTP status (RFC 6455: 4000 to 4999 are for private use)."""

_NORMAL, _GOING_AWAY = 1000, 1001

_MAX_IN_FLIGHT = 2 * MAX_FRAME_PAYMENTS
"""Payments of one stream without an answer: one lot is judged while the one before it is being written."""

_FRAME_FACTOR = 16
"""Bytes of a frame, in the largest bodies that `PUT` takes."""


class _Hello(Struct, frozen=True, forbid_unknown_fields=True):
    """The first message of a client that has not named its secret yet."""

    secret: str


_hello_decoder = msgspec.json.Decoder(_Hello)


class StreamHandler(WebSocketHandler, V2Handler):
    """One stream of one channel."""

    def initialize(self, service: Service) -> None:
        super().initialize(service)
        self._channel: Channel | None = None
        self._gathered: list[Frame] = []
        self._turn = asyncio.Lock()
        self._last: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._room: asyncio.Future[None] | None = None
        self._ending = False
        self._deadline: asyncio.TimerHandle | None = None

    # --- beginning --------------------------------------------------------------------------------------------------

    async def get(self, txid: str, vout: str) -> None:
        """Upgrade. Who names the secret is told now whether it is the channel's; who does not yet, by a close code."""
        self._named = outpoint(txid, vout)
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            raise Malformed(field="Upgrade", reason="want websocket")
        limit = self.service.config.stream.max_streams
        if len(self.service.streams) >= limit:
            raise TooManyStreams(limit=limit)
        if arguments := self._secret():
            self._channel = await self.found(find_channel(self.service, self._named, arguments))
        await super().get(txid, vout)

    def _secret(self) -> Mapping[str, Sequence[bytes]]:
        """The secret of a header (`Authorization: Bearer …`) or of the query."""
        scheme, _, given = self.request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return {"secret": [given.strip().encode("latin1")]}
        return self.request.query_arguments

    def open(self, *_path: str) -> None:
        self.service.streams.add(self)
        if self._channel is None:
            wait = self.service.config.http.body_seconds
            self._deadline = asyncio.get_running_loop().call_later(wait, self._end, UnknownChannel())
        else:
            self._begin(self._channel)

    def _begin(self, channel: Channel) -> None:
        self._channel = channel
        self._answers = Answers(self.service, channel, self.url)

    async def _introduce(self, message: str | bytes) -> None:
        """Take the first message for the secret."""
        began = asyncio.get_running_loop().time()
        if self._deadline is not None:
            self._deadline.cancel()
        try:
            secret = _hello_decoder.decode(message).secret.encode()
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            secret = b""
        try:
            self._begin(await find_channel(self.service, self._named, {"secret": [secret]}))
        except UnknownChannel as error:
            await until_404s_leave(began)
            self._end(error)

    # --- payments ---------------------------------------------------------------------------------------------------

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        """Gather a frame; what is returned is waited for before the next one is read."""
        if self._ending:
            return None
        if self._channel is None:
            return self._introduce(message)
        frame = read_frame(self.service, self._channel, message)
        self._ending = frame.broken is not None
        if not self._gathered:
            asyncio.get_running_loop().call_soon(self._give)
        self._gathered.append(frame)
        self._in_flight += len(frame.asked)
        if self._in_flight < _MAX_IN_FLIGHT:
            return None
        self._room = asyncio.get_running_loop().create_future()
        return self._room

    def _give(self) -> None:
        """Start to serve what was gathered."""
        frames, self._gathered = self._gathered, []
        self._last = asyncio.get_running_loop().create_task(self._serve(frames, self._last))

    async def _serve(self, frames: Sequence[Frame], before: asyncio.Task[None] | None) -> None:
        """Have the payments of some frames judged, and answer them behind those that came before."""
        try:
            outcomes = await self._judged(frames)
            if before is not None and not before.done():
                await asyncio.wait([before])
            await self._answer(frames, outcomes)
        except WebSocketClosedError:
            self._ending = True
        except Exception:
            log.exception("stream failed", channel=str(self._named))
            self._end(InternalError())
        self._in_flight -= sum(len(frame.asked) for frame in frames)
        if self._room is not None and self._in_flight < _MAX_IN_FLIGHT:
            self._room.set_result(None)
            self._room = None

    async def _judged(self, frames: Sequence[Frame]) -> list[Outcome]:
        asked = [each for frame in frames for each in frame.asked]
        commands = [each for each in asked if isinstance(each, Pay)]
        if not commands:
            return [Rejected(each) for each in asked if isinstance(each, PaychanError)]
        assert self._channel is not None
        outcomes = await self.service.registry.pay_several(self._channel.outpoint, commands, self._turn)
        if len(commands) == len(asked):
            return outcomes
        judged = iter(outcomes)
        return [next(judged) if isinstance(each, Pay) else Rejected(each) for each in asked]

    async def _answer(self, frames: Sequence[Frame], outcomes: list[Outcome]) -> None:
        """Write the answers, binary ones together; then end the stream if one of them says so."""
        if all(frame.binary for frame in frames):
            if outcomes:
                await self.write_message(await self._answers.binary(outcomes), binary=True)
        else:
            rest = iter(outcomes)
            for frame in frames:
                own = [next(rest) for _ in frame.asked]
                if frame.binary:
                    await self.write_message(await self._answers.binary(own), binary=True)
                else:
                    await self.write_message(await self._answers.text(frame, own))
        end = ends(outcomes) or frames[-1].broken
        if isinstance(end, PaychanError):
            self._end(end)
        elif end is not None:
            self.close(_NORMAL, "channel closed")

    # --- ending -----------------------------------------------------------------------------------------------------

    def _end(self, error: PaychanError) -> None:
        self._ending = True
        self.close(CLOSE_CODES + error.http_status, error.code)

    def on_close(self) -> None:
        self._ending = True
        self.service.streams.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    # --- settings ---------------------------------------------------------------------------------------------------

    @property
    def ping_interval(self) -> float:
        return self.service.config.stream.ping_seconds

    @property
    def max_message_size(self) -> int:
        return self.service.config.http.max_body_bytes * _FRAME_FACTOR

    def check_origin(self, origin: str) -> bool:  # noqa: ARG002 - every one is welcome
        """Any page may pay, as by `PUT`: what counts is the secret, and no browser adds that by itself."""
        return True


def close_all(service: Service) -> None:
    """End every stream because the server stops."""
    for stream in list(service.streams):
        stream.close(_GOING_AWAY, "server stops")


ROUTES: list[tuple[str, Any]] = [(rf"/v2/channels/{OUTPOINT}/stream", StreamHandler)]
