"""The payment stream: `GET /v2/channels/{txid}/{vout}/stream`, upgraded to WebSocket.

Payments come in frames, answers leave in their order. Frames that have arrived by the time the loop gets to them are
given to the channel together. How many payments may be on their way is bounded: beyond that nothing more is read, so a
client that sends faster waits on its own socket.

A stream that ends because of an error has the close code 4000 + the error's HTTP status, and its code as the reason.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import structlog
from msgspec import Struct
from tornado.websocket import WebSocketClosedError, WebSocketHandler, WebSocketProtocol, WebSocketProtocol13

from actors.channel import PaySeveral
from paychan.api.answers import OUTPOINT, outpoint, until_404s_leave
from paychan.api.manners import Manners
from paychan.api.service import Service
from paychan.api.streamframes import Answers, Frame, commands_of, ends, outcomes_of, plain_answers, read_frame
from paychan.api.streamreading import BulkProtocol
from paychan.api.v2 import V2Handler, find_channel
from paychan.protocol.channel import Channel, Outcome, Rejected
from paychan.protocol.errors import BadSignature, InternalError, Malformed, PaychanError, TooManyStreams, UnknownChannel
from paychan.protocol.several import Commands
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


class _Lot:
    """Frames that were given to the channel together, and what came of their payments."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = frames
        self.size = sum(map(_weight, frames))
        self.outcomes: Sequence[Outcome] | None = None


def _weight(frame: Frame) -> int:
    return len(frame.asked) or 1


class StreamHandler(WebSocketHandler, V2Handler):
    """One stream of one channel."""

    def initialize(self, service: Service) -> None:
        super().initialize(service)
        self._channel: Channel | None = None
        self._gathered: list[Frame] = []
        self._lots: deque[_Lot] = deque()
        self._manners = Manners(service.config.http.max_bad_signatures)
        self._turn, self._asleep = asyncio.Lock(), 0
        self._writer: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
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
        self._channel, self._outpoint = channel, channel.outpoint
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
        self._in_flight += _weight(frame)
        if self._in_flight < _MAX_IN_FLIGHT:
            return None
        self._room = asyncio.get_running_loop().create_future()
        return self._room

    def _give(self) -> None:
        """Give the channel what was gathered."""
        lot = _Lot(self._gathered)
        self._gathered = []
        self._lots.append(lot)
        commands = commands_of(lot.frames)
        registry = self.service.registry
        actor = registry.reach(self._outpoint) if not self._asleep else None
        if not commands:
            self._judged(lot, ())
        elif actor is None:
            self._asleep += 1
            waking = asyncio.get_running_loop().create_task(self._give_asleep(lot, commands))
            self._tasks.add(waking)
            waking.add_done_callback(self._tasks.discard)
        else:
            registry.give(actor, PaySeveral(commands), partial(self._take, lot))

    async def _give_asleep(self, lot: _Lot, commands: Commands) -> None:
        """Wake the channel; until it is awake what comes later stays behind this."""
        try:
            judged = await self.service.registry.pay_several(self._outpoint, commands, self._turn)
        finally:
            self._asleep -= 1
        self._judged(lot, judged)

    def _take(self, lot: _Lot, answer: Any) -> None:
        try:
            judged = answer.result()
        except Exception:
            log.exception("stream failed", channel=str(self._outpoint))
            self._end(InternalError())
        else:
            self._judged(lot, judged)

    # --- answers ----------------------------------------------------------------------------------------------------

    def _judged(self, lot: _Lot, judged: Sequence[Outcome]) -> None:
        """Answer this lot and what waits behind it, unless it has to wait itself."""
        lot.outcomes = outcomes_of(lot.frames, judged)
        while self._writer is None and self._lots and self._lots[0].outcomes is not None:
            first = self._lots[0]
            plain = plain_answers(first.frames, first.outcomes or ())
            if plain is None:
                self._writer = asyncio.get_running_loop().create_task(self._answer_all())
                return
            self._lots.popleft()
            self._write(plain, first)

    async def _answer_all(self) -> None:
        """Answer, in their order, lots of which more is to be said than that they were accepted."""
        try:
            while self._lots and (outcomes := self._lots[0].outcomes) is not None:
                lot = self._lots.popleft()
                await self._answer(lot.frames, outcomes)
                self._release(lot)
        except WebSocketClosedError:
            self._ending = True
        except Exception:
            log.exception("stream failed", channel=str(self._outpoint))
            self._end(InternalError())
        finally:
            self._writer = None

    async def _answer(self, frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> None:
        """Write the answers of each frame; then end the stream if one of them says so."""
        for outcome in outcomes:
            if isinstance(outcome, Rejected) and isinstance(outcome.error, BadSignature):
                await asyncio.sleep(self._manners.bad_signature())
        rest = iter(outcomes)
        for frame in frames:
            own = [next(rest) for _ in frame.asked]
            if own and frame.binary:
                await self.write_message(await self._answers.binary(own), binary=True)
            elif not frame.binary:
                await self.write_message(await self._answers.text(frame, own))
        end = ends(outcomes) or self._manners.problem() or frames[-1].broken
        if isinstance(end, PaychanError):
            self._end(end)
        elif end is not None:
            self.close(_NORMAL, "channel closed")

    def _write(self, answers: bytes, lot: _Lot) -> None:
        """Write a binary message past Tornado, which would make a task of it."""
        stream = None if self.ws_connection is None else self.ws_connection.stream
        if stream is None or stream.closed():
            return
        size = len(answers)
        head = bytes((0x82, size)) if size < 126 else b"\x82\x7e" + size.to_bytes(2)
        written = stream.write(head + answers)
        if written.done():
            self._release(lot)
        else:  # the client takes no answers at the moment
            written.add_done_callback(lambda _: self._release(lot))

    def _release(self, lot: _Lot) -> None:
        """Make room for more payments, as these are answered."""
        self._in_flight -= lot.size
        if self._room is not None and self._in_flight < _MAX_IN_FLIGHT:
            self._room.set_result(None)
            self._room = None

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

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        protocol = super().get_websocket_protocol()
        return BulkProtocol(self, False, protocol.params) if isinstance(protocol, WebSocketProtocol13) else protocol

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
