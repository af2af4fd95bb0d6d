"""What a frame of the payment stream asks, and how its payments are answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Asked: TypeAlias = Pay | PaychanError
"""A payment, or why it is none."""

_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


class Frame(Struct, frozen=True):
    """A frame as it came."""

    asked: Sequence[Asked] | CompactPayments = ()
    binary: bool = True
    single: bool = False
    """Text of one payment without a list around it; so is its answer."""
    dialects: Sequence[Dialect] = ()
    """Of each payment in text."""
    broken: PaychanError | None = None
    """It can't be told what payments it holds: the stream ends behind what came before."""

    @property
    def unpaid(self) -> int:
        """How much of it is no payment."""
        if self.binary:
            return 0  # is broken instead
        return sum(isinstance(each, PaychanError) for each in self.asked) or not self.asked


def read_frame(service: Service, channel: Channel, message: bytes, *, binary: bool) -> Frame:
    """Read a frame. What is wrong with a payment in text is that payment's alone."""
    try:
        frame = _binary(message) if binary else _text(service, channel, message)
    except Malformed as error:
        return Frame(broken=error)
    if len(frame.asked) > MAX_FRAME_PAYMENTS:
        return Frame(broken=TooManyPayments(got=len(frame.asked), limit=MAX_FRAME_PAYMENTS))
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
    return Frame([asked for asked, _ in read], False, single, [dialect for _, dialect in read])


def _payment(service: Service, channel: Channel, raw: bytes) -> tuple[Asked, Dialect]:
    try:
        body = read_v2_body(raw)
        return payment_command(service, channel, body), body.dialect
    except PaychanError as error:
        return error, Dialect.S


def commands_of(frames: Sequence[Frame]) -> Commands:
    """The payments of some frames, one behind the other, without what is none."""
    compact = [frame.asked for frame in frames if isinstance(frame.asked, CompactPayments)]
    if len(compact) == len(frames):
        return CompactPayments.joined(compact)
    return [
        Pay(each) if isinstance(each, Payment) else each
        for frame in frames
        for each in frame.asked
        if not isinstance(each, PaychanError)
    ]


def outcomes_of(frames: Sequence[Frame], judged: Sequence[Outcome]) -> Sequence[Outcome]:
    """What was judged, and between it why something is no payment."""
    if len(judged) == sum(len(frame.asked) for frame in frames):
        return judged
    rest = iter(judged)
    return [
        Rejected(each) if isinstance(each, PaychanError) else next(rest) for frame in frames for each in frame.asked
    ]


# --- answers --------------------------------------------------------------------------------------------------------


def plain_answers(frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> bytes | None:
    """Answer payments in binary that were accepted and left the channel open; None: there is more to say."""
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
        """Answer a text frame: what `PUT` would have answered, and the status of what was refused."""
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
    """What among the outcomes leaves nothing to pay for on this stream: a payment that closed the channel, or its end."""
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
