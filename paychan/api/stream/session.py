"""The payments of one stream: frames are grouped into batches, the channel judges a batch, answers are sent in order.

All frames that were read in one turn of the loop form a batch, which is submitted to the channel as a whole. The number
of payments in flight is limited: at the limit nothing more is read, so that a client that sends faster blocks on its
socket.

A stream that ends because of an error has the close code 4000 + the error's HTTP status, and its code as the reason.
When the stream ends, for whatever reason, its slot is freed and the pending answers are dropped. Payments that were
submitted to the channel remain valid.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from time import monotonic
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from actors.channel import Payments
from paychan.api.budgets.stream_slots import WAITING_SECONDS
from paychan.api.responses import until_404s_leave
from paychan.api.service import Service
from paychan.api.stream.frames import (
    Answers,
    Batch,
    Frame,
    all_of_value,
    ends,
    plain_answers,
    read_frame,
)
from paychan.api.stream.reader import WebSocket
from paychan.api.stream.websocket import BINARY, NORMAL, TEXT
from paychan.api.v2 import find_channel
from paychan.protocol.channel import Channel, Outcome
from paychan.protocol.errors import InternalError, PaychanError, UnknownChannel
from paychan.protocol.payment_batch import commands_after, count_without_value, ends_with_bad_signature
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.payment_frames import MAX_FRAME_PAYMENTS
from paychan.tracing import continue_request, enter_channel

log = structlog.get_logger("stream")

CLOSE_CODES = 4000
"""The close code of an error is this plus its HTTP status (RFC 6455: 4000 to 4999 are for private use)."""

_MAX_IN_FLIGHT = 2 * MAX_FRAME_PAYMENTS
"""Payments of one stream without an answer: the channel judges one batch while the one before it is written to disk."""


class _Hello(Struct, frozen=True, forbid_unknown_fields=True):
    """The first message of a client that did not name the secret in its request."""

    secret: str


_hello_decoder = msgspec.json.Decoder(_Hello)


class StreamSession:
    """One stream of one channel; `websocket` must be set before it begins."""

    websocket: WebSocket
    holder: Any = None
    """The connection; it counts as busy once the secret is named, see `connection_slots`."""

    def __init__(self, service: Service, named: OutPoint, address: str, url: Callable[[str], str]) -> None:
        self.address, self.paid_at = address, monotonic()
        self._service, self._named, self._url = service, named, url
        self._channel: Channel | None = None
        self._gathered: list[Frame] = []
        self._batches: deque[Batch] = deque()
        self._in_flight = 0
        self._held: Batch | None = None
        """A batch that is not completely judged; later frames wait for it."""
        self._answering: asyncio.Task[None] | None = None
        self._introducing: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._ending = self.is_over = False

    # --- beginning --------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait in the waiting room until the client names the secret."""
        self._service.streams.wait(self)
        seconds = min(WAITING_SECONDS, self._service.config.http.body_seconds)
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.end, UnknownChannel())

    def begin(self, channel: Channel) -> None:
        """Take a slot, because the client has named the channel's secret.

        Raises:
            TooManyBadSignatures, TooManyStreams: the channel's streams are refused at present, or no slot is free.
        """
        problem = self._service.streams.problem(channel.outpoint)
        if problem is not None:
            raise problem
        self._service.streams.take(self, channel.outpoint)
        self._channel, self._outpoint = channel, channel.outpoint
        self._answers = Answers(self._service, channel, self._url)
        self.websocket.admit()
        if self.holder is not None:
            self.holder.paid = True
            self.holder.start_work()

    async def _introduce(self, message: bytes) -> None:
        """Check the secret in the first message. The next message is read only after this has ended."""
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
        self.websocket.resume()

    # --- calls of the WebSocket -------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether a further message may be read."""
        return self._in_flight < _MAX_IN_FLIGHT and not self._ending and self._introducing is None

    @property
    def is_busy(self) -> bool:
        """Whether some payments have no answer yet."""
        return self._in_flight > 0

    @property
    def is_gone(self) -> bool:
        """Whether the connection has ended."""
        return self.websocket.is_gone

    def message(self, payload: bytes, *, binary: bool) -> None:
        """Keep a message until `turn_over` submits it to the channel."""
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
        self._in_flight += frame.weight

    def turn_over(self) -> None:
        """Submit the gathered frames to the channel, or the rest of a batch that was judged in part."""
        batch = self._held
        if batch is None:
            if not self._gathered:
                return
            batch = self._held = Batch(self._gathered)
            self._gathered = []
            if not self.is_over:
                self._batches.append(batch)
        if not batch.waits:
            self._submit(batch)

    def ended(self) -> None:
        """Free the slot and drop the pending answers.

        Payments that were received are still submitted to the channel.
        """
        self._ending = self.is_over = True
        self._service.streams.leave(self)
        for task in (self._answering, self._introducing):
            if task is not None:
                task.cancel()
        for timer in (self._deadline, self._pause):
            if timer is not None:
                timer.cancel()
        self._batches.clear()
        if self._gathered:
            self._soon()

    # --- payments ---------------------------------------------------------------------------------------------------

    def _submit(self, batch: Batch) -> None:
        """Submit the payments of a batch that the channel has not judged."""
        if batch.is_judged:
            self._go_on()
            return
        actor = self._service.registry.actors.get(self._outpoint)
        if actor is None or not actor.alive:
            batch.waits = True
            self._run(self._wake(batch))
            return
        commands = commands_after(batch.commands, batch.judged) if batch.judged else batch.commands
        number = len(batch.parts)
        batch.parts.append(None)
        message = Payments(commands, partial(self._note_part, batch, number), in_parts=True)
        self._service.registry.unanswered += 1
        actor.tell(message)
        batch.judged += message.judged
        outcomes = message.outcomes or batch.parts[number]
        if message.waits and outcomes is None:
            batch.waits, batch.awaited = True, number
        else:
            self._part_judged(batch, outcomes or ())

    async def _wake(self, batch: Batch) -> None:
        """Wake the channel, then submit the batch, also if the client has disconnected: its payments count."""
        if await self._service.registry.awaken(self._outpoint) is None:
            batch.refuse_rest(UnknownChannel())
        batch.waits = False
        self._submit(batch)

    def _part_judged(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """Continue after a part of a batch was judged.

        A bad signature delays all later payments, and too many of them end the stream. Many payments of no value also
        delay later payments, but do not end the stream.
        """
        slots, is_bad = self._service.streams, False
        if self._outpoint not in slots.allowances and all_of_value(outcomes):
            seconds = 0.0  # nearly always
        elif is_bad := ends_with_bad_signature(outcomes):
            seconds = slots.bad_signature(self._outpoint)
        else:
            empty = count_without_value(outcomes)
            seconds = slots.count(self._outpoint, empty, len(outcomes) - empty)
        if seconds and self.is_over:
            self._gathered, batch.waits = [], True  # later payments are discarded
        elif seconds:
            problem = slots.problem(self._outpoint) if is_bad else None
            if problem is not None:
                batch.refuse_rest(problem)
                batch.problem, self._ending = problem, True
            batch.waits = True
            self._pause = asyncio.get_running_loop().call_later(seconds, self._resume, batch)
        elif batch.is_judged:
            self._go_on()
        else:
            self._soon()

    def _soon(self) -> None:
        """Call `turn_over` in a later turn of the loop."""
        if self.is_over:
            asyncio.get_running_loop().call_soon(self.turn_over)
        else:
            self.websocket.resume()

    def _resume(self, batch: Batch) -> None:
        batch.waits, self._pause = False, None
        self._soon()

    def _go_on(self) -> None:
        """Finish a batch that was judged completely: answer it when all is on disk, and submit the frames after it."""
        self._held = None
        self._answer_batches()
        if self._gathered:
            self._soon()

    def _note_part(self, batch: Batch, number: int, answered: Payments) -> None:
        """Store the final outcomes of a part of a batch."""
        self._service.registry.unanswered -= 1
        if answered.failed:
            self.end(InternalError())
            return
        batch.parts[number] = outcomes = answered.outcomes
        if self._service.context.observers.wants_refusals:
            self._service.registry.report_refusals(self._outpoint, outcomes)
        if number == batch.awaited:
            batch.waits, batch.awaited = False, -1
            self._part_judged(batch, outcomes)
        self._answer_batches()

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answer_batches(self) -> None:
        """Answer the batches whose outcomes are all known, in order."""
        while self._answering is None and self._batches and self._batches[0] is not self._held:
            first = self._batches[0]
            outcomes = first.outcomes()
            if outcomes is None or self.is_over:
                return
            self._batches.popleft()
            plain = plain_answers(first.frames, outcomes)
            if plain is None:
                self._answering = self._run(self._answer(first, outcomes))
            else:
                self.websocket.write(BINARY, plain)
                self._release(first)

    async def _answer(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """Answer a batch for which `plain_answers` is not enough.

        Then end the stream if an outcome or a frame ends it.
        """
        continue_request()
        enter_channel(self._outpoint)
        rest, until = iter(outcomes), 0.0
        for frame in batch.frames:
            if monotonic() >= until:
                until = await self._service.turns.slice()
            own = [next(rest) for _ in frame.payments]
            if own and frame.binary:
                self.websocket.write(BINARY, await self._answers.binary(own))
            elif not frame.binary:
                self.websocket.write(TEXT, await self._answers.text(frame, own))
        end = ends(outcomes) or batch.problem or batch.frames[-1].broken
        if isinstance(end, PaychanError):
            self.end(end)
        elif end is not None:
            self.close(NORMAL, "channel closed")
        self._answering = None
        self._release(batch)
        self._answer_batches()

    def _release(self, batch: Batch) -> None:
        """Count the payments of an answered batch as no longer in flight."""
        was_full = not self.has_room
        self._in_flight -= batch.size
        self.paid_at = monotonic()
        if was_full and not self.is_over:
            self.websocket.resume()

    # --- ending -----------------------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in a task. A failure ends the stream."""
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("stream failed", channel=str(self._outpoint), exc_info=error)
            self.end(error if isinstance(error, PaychanError) else InternalError())

    def end(self, error: PaychanError) -> None:
        """Close with the code of an error."""
        self.close(CLOSE_CODES + error.http_status, error.code)

    def finish(self) -> None:
        """Read nothing more; answer the payments that were read."""
        self._ending = True

    def close(self, code: int, reason: str) -> None:
        """Close the WebSocket with a code and a reason."""
        self.websocket.close(code, reason)

    def abort(self) -> None:
        """Close the connection at once."""
        self.websocket.abort()
