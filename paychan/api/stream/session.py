"""The payments of one stream: frames that were read become lots, lots are judged by the channel, answers leave in order.

What one turn of the loop has read is a lot, and is given to the channel together. How many payments may be on their way is
bounded: beyond that nothing more is read, so a client that sends faster waits on its own socket.

A stream that ends because of an error has the close code 4000 + the error's HTTP status, and its code as the reason.
When the stream ends, by whichever side and however suddenly, its place is given back and what waits to be answered is
dropped; payments that the channel has been given stay paid.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import chain
from time import monotonic
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from actors.channel import PayBatch
from paychan.api.budgets.stream_slots import WAITING_SECONDS
from paychan.api.responses import until_404s_leave
from paychan.api.service import Service
from paychan.api.stream.frames import Answers, Frame, commands_of, ends, outcomes_of, plain_answers, read_frame
from paychan.api.stream.reader import WebSocket
from paychan.api.stream.websocket import BINARY, NORMAL, TEXT
from paychan.api.v2 import find_channel
from paychan.protocol.channel import Channel, Outcome, Rejected
from paychan.protocol.errors import InternalError, PaychanError, UnknownChannel
from paychan.protocol.payment_batch import empty_of, ends_badly, rest_of
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.payment_frames import MAX_FRAME_PAYMENTS

log = structlog.get_logger("stream")

CLOSE_CODES = 4000
"""An error's close code is this and its HTTP status (RFC 6455: 4000 to 4999 are for private use)."""

_MAX_IN_FLIGHT = 2 * MAX_FRAME_PAYMENTS
"""Payments of one stream without an answer: one lot is judged while the one before it is being written."""


class _Hello(Struct, frozen=True, forbid_unknown_fields=True):
    """The first message of a client that has not named its secret yet."""

    secret: str


_hello_decoder = msgspec.json.Decoder(_Hello)


class _Lot:
    """Frames that are given to the channel together, and what came of their payments; maybe in several parts."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames, self.commands = frames, commands_of(frames)
        self.size = sum(map(_weight, frames))
        self.given = 0
        """How many of the payments the channel has judged."""
        self.parts: list[Sequence[Outcome] | None] = []
        """What came of those, as far as it is known."""
        self.waits = False
        """Whether something must come before more of it is given to the channel."""
        self.awaited = -1
        """Number of the part whose answer that is."""
        self.problem: PaychanError | None = None
        """Why the stream ends behind this lot."""

    @property
    def is_given(self) -> bool:
        return self.given >= len(self.commands)

    def outcomes(self) -> Sequence[Outcome] | None:
        """An outcome for everything in the frames; None while some are not known."""
        parts = [part for part in self.parts if part is not None]
        if not self.is_given or len(parts) < len(self.parts):
            return None
        return outcomes_of(self.frames, parts[0] if len(parts) == 1 else list(chain.from_iterable(parts)))

    def refuse_rest(self, error: PaychanError) -> None:
        """Refuse what was not judged."""
        self.parts.append([Rejected(error)] * (len(self.commands) - self.given))
        self.given = len(self.commands)


def _weight(frame: Frame) -> int:
    return len(frame.asked) or 1


class StreamSession:
    """One stream of one channel; `websocket` must be set before it begins."""

    websocket: WebSocket
    guest: Any = None
    """The connection, which keeps its place once the secret is named; see `places`."""

    def __init__(self, service: Service, named: OutPoint, address: str, url: Callable[[str], str]) -> None:
        self.address, self.paid_at = address, monotonic()
        self._service, self._named, self._url = service, named, url
        self._channel: Channel | None = None
        self._gathered: list[Frame] = []
        self._lots: deque[_Lot] = deque()
        self._in_flight = 0
        self._held: _Lot | None = None
        """A lot that is not judged as a whole yet; what comes later waits behind it."""
        self._answering: asyncio.Task[None] | None = None
        self._introducing: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._ending = self.is_over = False

    # --- beginning --------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait for the secret in the waiting room."""
        self._service.streams.wait(self)
        seconds = min(WAITING_SECONDS, self._service.config.http.body_seconds)
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.end, UnknownChannel())

    def begin(self, channel: Channel) -> None:
        """Take a place, as the client has named the channel's secret.

        Raises:
            TooManyBadSignatures, TooManyStreams: there is none.
        """
        problem = self._service.streams.problem(channel.outpoint)
        if problem is not None:
            raise problem
        self._service.streams.take(self, channel.outpoint)
        self._channel, self._outpoint = channel, channel.outpoint
        self._answers = Answers(self._service, channel, self._url)
        self.websocket.admit()
        if self.guest is not None:
            self.guest.paid = True
            self.guest.begins()

    async def _introduce(self, message: bytes) -> None:
        """Take the first message for the secret. There is no second one before this has ended."""
        began = asyncio.get_running_loop().time()
        try:
            secret = _hello_decoder.decode(message).secret.encode()
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            secret = b""
        try:
            channel = await find_channel(self._service, self._named, {"secret": [secret]})
            if not self.is_over:
                self.begin(channel)
        except UnknownChannel as error:
            await until_404s_leave(began)
            self.end(error)
        except PaychanError as error:
            self.end(error)
        except Exception:
            log.exception("stream failed", channel=str(self._named))
            self.end(InternalError())
        finally:
            self._introducing = None
            if self._deadline is not None:
                self._deadline.cancel()
        self.websocket.go_on()

    # --- what the WebSocket asks ------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether a message may come."""
        return self._in_flight < _MAX_IN_FLIGHT and not self._ending and self._introducing is None

    @property
    def is_busy(self) -> bool:
        """Whether payments have no answer yet."""
        return self._in_flight > 0

    @property
    def is_gone(self) -> bool:
        """Whether the connection has ended."""
        return self.websocket.is_gone

    def message(self, payload: bytes, *, binary: bool) -> None:
        """Gather a message; `turn_over` gives it to the channel."""
        if self._channel is None:
            self._introducing = asyncio.get_running_loop().create_task(self._introduce(payload))
            return
        frame = read_frame(self._service, self._channel, payload, binary=binary)
        self._ending = frame.broken is not None
        unpaid = frame.unpaid
        if unpaid:
            self.websocket.spend(unpaid)
        else:
            self.websocket.earn()
        self._gathered.append(frame)
        self._in_flight += _weight(frame)

    def turn_over(self) -> None:
        """Give the channel what was gathered, or more of what it was given only a part of."""
        lot = self._held
        if lot is None:
            if not self._gathered:
                return
            lot = self._held = _Lot(self._gathered)
            self._gathered = []
            if not self.is_over:
                self._lots.append(lot)
        if not lot.waits:
            self._give(lot)

    def ended(self) -> None:
        """Give back the place, and drop what waits to be answered; payments that came are given to the channel still."""
        self._ending = self.is_over = True
        self._service.streams.leave(self)
        for task in (self._answering, self._introducing):
            if task is not None:
                task.cancel()
        for timer in (self._deadline, self._pause):
            if timer is not None:
                timer.cancel()
        self._lots.clear()
        if self._gathered:
            self._soon()

    # --- payments ---------------------------------------------------------------------------------------------------

    def _give(self, lot: _Lot) -> None:
        """Give the channel the payments of a lot that it has not judged."""
        if lot.is_given:
            self._go_on()
            return
        actor = self._service.registry.reach(self._outpoint)
        if actor is None:
            lot.waits = True
            self._run(self._wake(lot))
            return
        message = PayBatch(rest_of(lot.commands, lot.given) if lot.given else lot.commands, in_parts=True)
        number = len(lot.parts)
        lot.parts.append(None)
        self._service.registry.give(actor, message, partial(self._take, lot, number))
        lot.given += message.judged
        outcomes = message.outcomes or lot.parts[number]
        if message.waits and outcomes is None:
            lot.waits, lot.awaited = True, number
        else:
            self._given(lot, outcomes or ())

    async def _wake(self, lot: _Lot) -> None:
        """Wake the channel, then give it the lot, also if the client has left meanwhile: it has paid."""
        if await self._service.registry.awaken(self._outpoint) is None:
            lot.refuse_rest(UnknownChannel())
        lot.waits = False
        self._give(lot)

    def _given(self, lot: _Lot, outcomes: Sequence[Outcome]) -> None:
        """Go on behind a part of a lot.

        A bad signature makes all that comes behind it wait, and too many end the stream; so do many payments that brought
        nothing, which end none.
        """
        places, is_bad, empty = self._service.streams, ends_badly(outcomes), empty_of(outcomes)
        if is_bad:
            seconds = places.bad_signature(self._outpoint)
        else:
            seconds = places.count(self._outpoint, empty, len(outcomes) - empty)
        if seconds and self.is_over:
            self._gathered, lot.waits = [], True  # what comes behind it is not looked at
        elif seconds:
            problem = places.problem(self._outpoint) if is_bad else None
            if problem is not None:
                lot.refuse_rest(problem)
                lot.problem, self._ending = problem, True
            lot.waits = True
            self._pause = asyncio.get_running_loop().call_later(seconds, self._waited, lot)
        elif lot.is_given:
            self._go_on()
        else:
            self._soon()

    def _soon(self) -> None:
        """Go on with `turn_over` in another turn of the loop."""
        if self.is_over:
            asyncio.get_running_loop().call_soon(self.turn_over)
        else:
            self.websocket.go_on()

    def _waited(self, lot: _Lot) -> None:
        lot.waits, self._pause = False, None
        self._soon()

    def _go_on(self) -> None:
        """A lot was judged as a whole: answer it when all is on disk, and judge what came behind it."""
        self._held = None
        self._answer_lots()
        if self._gathered:
            self._soon()

    def _take(self, lot: _Lot, number: int, answer: Any) -> None:
        """Note what came of a part of a lot."""
        try:
            lot.parts[number] = outcomes = answer.result()
        except (Exception, asyncio.CancelledError):
            log.exception("stream failed", channel=str(self._outpoint))
            self.end(InternalError())
            return
        if number == lot.awaited:
            lot.waits, lot.awaited = False, -1
            self._given(lot, outcomes)
        self._answer_lots()

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answer_lots(self) -> None:
        """Answer the lots of which everything is known, in their order."""
        while self._answering is None and self._lots and self._lots[0] is not self._held:
            first = self._lots[0]
            outcomes = first.outcomes()
            if outcomes is None or self.is_over:
                return
            self._lots.popleft()
            plain = plain_answers(first.frames, outcomes)
            if plain is None:
                self._answering = self._run(self._answer(first, outcomes))
            else:
                self.websocket.write(BINARY, plain)
                self._release(first)

    async def _answer(self, lot: _Lot, outcomes: Sequence[Outcome]) -> None:
        """Answer a lot of which more is to be said than that all was accepted; then end the stream if one outcome says so."""
        rest, until = iter(outcomes), 0.0
        for frame in lot.frames:
            if monotonic() >= until:
                until = await self._service.turns.slice()
            own = [next(rest) for _ in frame.asked]
            if own and frame.binary:
                self.websocket.write(BINARY, await self._answers.binary(own))
            elif not frame.binary:
                self.websocket.write(TEXT, await self._answers.text(frame, own))
        end = ends(outcomes) or lot.problem or lot.frames[-1].broken
        if isinstance(end, PaychanError):
            self.end(end)
        elif end is not None:
            self.close(NORMAL, "channel closed")
        self._answering = None
        self._release(lot)
        self._answer_lots()

    def _release(self, lot: _Lot) -> None:
        """Make room for more payments, as these are answered."""
        was_full = not self.has_room
        self._in_flight -= lot.size
        self.paid_at = monotonic()
        if was_full and not self.is_over:
            self.websocket.go_on()

    # --- ending -----------------------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what takes longer. A failure ends the stream."""
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("stream failed", channel=str(self._outpoint), exc_info=error)
            self.end(InternalError())

    def end(self, error: PaychanError) -> None:
        """Close with the code of an error."""
        self.close(CLOSE_CODES + error.http_status, error.code)

    def finish(self) -> None:
        """Read nothing more, and answer what was read."""
        self._ending = True

    def close(self, code: int, reason: str) -> None:
        """Close."""
        self.websocket.close(code, reason)

    def abort(self) -> None:
        """End the connection now."""
        self.websocket.abort()
