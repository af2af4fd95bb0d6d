"""Frames of the payment stream: reading their payments, and writing the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from paychan.api.responses import refusal
from paychan.api.service import Service
from paychan.api.v2 import moved_answer, payment_command, shown
from paychan.protocol.channel import Accepted, Channel, Outcome, Pay, Rejected, State
from paychan.protocol.errors import ChannelMoved, Malformed, PaychanError, TooManyPayments
from paychan.protocol.payment import Payment
from paychan.protocol.payment_batch import BatchAccepted, Commands
from paychan.protocol.wire.payment_frames import (
    MAX_FRAME_PAYMENTS,
    CompactPayments,
    Said,
    Taken,
    read_payments,
    write_answers,
    write_taken,
)
from paychan.protocol.wire.rbpcp import Dialect, encode_json, read_v2_body

Item: TypeAlias = Pay | PaychanError
"""A payment, or why this part of a frame is not a payment."""

_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


class Frame(Struct, frozen=True):
    """A frame that was read."""

    payments: Sequence[Item] | CompactPayments = ()
    binary: bool = True
    single: bool = False
    """Whether the text is one payment without a list; then the answer has no list either."""
    dialects: Sequence[Dialect] = ()
    """The dialect of each payment in text."""
    broken: PaychanError | None = None
    """Why its payments can't be read, or None. The stream ends after the frames before it."""

    @property
    def weight(self) -> int:
        """Number of payments that it counts for while it has no answer."""
        return len(self.payments) or 1

    @property
    def unpaid(self) -> int:
        """Number of parts that are not payments."""
        if self.binary:
            return 0  # a binary frame with an error is `broken`
        return sum(isinstance(each, PaychanError) for each in self.payments) or not self.payments


def read_frame(service: Service, channel: Channel, message: bytes, *, binary: bool) -> Frame:
    """Read a frame. In text, an error in one payment does not affect the others."""
    try:
        frame = _binary(message) if binary else _text(service, channel, message)
    except Malformed as error:
        return Frame(broken=error)
    if len(frame.payments) > MAX_FRAME_PAYMENTS:
        return Frame(broken=TooManyPayments(got=len(frame.payments), limit=MAX_FRAME_PAYMENTS))
    return frame


def _binary(message: bytes) -> Frame:
    return Frame(read_payments(message))


def _text(service: Service, channel: Channel, raw: bytes) -> Frame:
    single, parts = not raw.lstrip(b" \t\r\n").startswith(b"["), [raw]
    if not single:
        try:
            parts = [bytes(part) for part in _list_decoder.decode(raw)[: MAX_FRAME_PAYMENTS + 1]]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(field="frame", reason=str(error)[:120]) from None
    read = [_payment(service, channel, part) for part in parts]
    return Frame([item for item, _ in read], False, single, [dialect for _, dialect in read])


def _payment(service: Service, channel: Channel, raw: bytes) -> tuple[Item, Dialect]:
    try:
        body = read_v2_body(raw)
        return payment_command(service, channel, body), body.dialect
    except PaychanError as error:
        return error, Dialect.S


def commands_of(frames: Sequence[Frame]) -> Commands:
    """Return the payments of some frames, in order, without the parts that are not payments."""
    compact = [frame.payments for frame in frames if isinstance(frame.payments, CompactPayments)]
    if len(compact) == len(frames):
        return CompactPayments.joined(compact)
    return [
        Pay(each) if isinstance(each, Payment) else each
        for frame in frames
        for each in frame.payments
        if not isinstance(each, PaychanError)
    ]


def outcomes_of(frames: Sequence[Frame], judged: Sequence[Outcome]) -> Sequence[Outcome]:
    """Return an outcome for every part of some frames: `judged` for the payments, a rejection for each other part."""
    if len(judged) == sum(len(frame.payments) for frame in frames):
        return judged
    rest = iter(judged)
    return [
        Rejected(each) if isinstance(each, PaychanError) else next(rest) for frame in frames for each in frame.payments
    ]


def all_of_value(outcomes: Sequence[Outcome]) -> bool:
    """Say whether all payments were accepted and brought a value."""
    if isinstance(outcomes, BatchAccepted):
        return True
    return all(isinstance(each, Accepted) and each.value_sat > 0 for each in outcomes)


class Batch:
    """Frames that are submitted to the channel together, with the outcomes.

    The channel may judge them in several parts.
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames, self.commands = frames, commands_of(frames)
        self.size = sum(frame.weight for frame in frames)
        self.judged = 0
        """Number of the payments that the channel has judged."""
        self.parts: list[Sequence[Outcome] | None] = []
        """Outcomes of the parts that were submitted; None: not known yet."""
        self.waits = False
        """Whether the rest must wait: for a wake-up, for an outcome, or for a delay."""
        self.awaited = -1
        """Index in `parts` of the outcome that the rest waits for, or -1."""
        self.problem: PaychanError | None = None
        """Why the stream ends after this batch, or None."""

    @property
    def is_judged(self) -> bool:
        return self.judged >= len(self.commands)

    def outcomes(self) -> Sequence[Outcome] | None:
        """Return an outcome for every part of the frames; None while some are not known."""
        parts = [part for part in self.parts if part is not None]
        if not self.is_judged or len(parts) < len(self.parts):
            return None
        return outcomes_of(self.frames, parts[0] if len(parts) == 1 else list(chain.from_iterable(parts)))

    def refuse_rest(self, error: PaychanError) -> None:
        """Refuse the payments that were not judged."""
        self.parts.append([Rejected(error)] * (len(self.commands) - self.judged))
        self.judged = len(self.commands)


# --- answers --------------------------------------------------------------------------------------------------------


def plain_answers(frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> bytes | None:
    """Answer binary payments that were all accepted and left the channel open; None: `Answers` must answer them."""
    if not outcomes or any(not frame.binary or frame.broken for frame in frames):
        return None
    if isinstance(outcomes, BatchAccepted):
        return write_taken(outcomes.changes, outcomes.values)
    taken = [outcome for outcome in outcomes if isinstance(outcome, Accepted) and _ordinary(outcome)]
    if len(taken) < len(outcomes):
        return None
    return write_taken([each.channel.payment.change_sat for each in taken], [each.value_sat for each in taken])


class Answers:
    """Writes the answers of one stream; `url` makes a path absolute."""

    def __init__(self, service: Service, channel: Channel, url: Callable[[str], str]) -> None:
        self._service, self._channel, self._url = service, channel, url

    async def binary(self, outcomes: Sequence[Outcome]) -> bytes:
        """Answer payments of one or more binary frames."""
        return write_answers(
            [
                Taken(outcome.channel.payment.change_sat, outcome.value_sat)
                if isinstance(outcome, Accepted) and _ordinary(outcome)
                else await self._said(outcome, Dialect.S)
                for outcome in outcomes
            ]
        )

    async def text(self, frame: Frame, outcomes: Sequence[Outcome]) -> bytes:
        """Answer a text frame with the bodies of answers to `PUT`; a refusal also has its HTTP status."""
        said = [await self._said(outcome, dialect) for outcome, dialect in zip(outcomes, frame.dialects, strict=True)]
        parts = [each.body if each.status == 200 else _with(each.body, status=each.status) for each in said]
        return parts[0] if frame.single else b"[" + b",".join(parts) + b"]"

    async def _said(self, outcome: Outcome, dialect: Dialect) -> Said:
        if isinstance(outcome, Accepted):
            return Said(200, encode_json(shown(outcome, dialect)))
        if isinstance(outcome.error, ChannelMoved):
            answer = await moved_answer(self._service, self._channel.outpoint, outcome.error, dialect, self._url)
            return Said(answer.status, _with(answer.body, location=dict(answer.headers)["Location"]))
        answer = refusal(outcome.error, quiet_404=False)
        return Said(answer.status, answer.body.rstrip())


def ends(outcomes: Sequence[Outcome]) -> PaychanError | Accepted | None:
    """Return the outcome that ends this stream, or None: a payment that closed the channel, or an error of its end."""
    for outcome in outcomes:
        if isinstance(outcome, Accepted):
            if outcome.channel.state is not State.OPEN:
                return outcome
        elif outcome.error.http_status in (308, 404, 410):
            return outcome.error
    return None


def _ordinary(outcome: Accepted) -> bool:
    return outcome.channel.state is State.OPEN and not outcome.application_data


def _with(body: bytes, **more: Any) -> bytes:
    shown_object: dict[str, Any] = msgspec.json.decode(body)
    return encode_json(shown_object | more)
