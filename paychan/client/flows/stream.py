"""Make many payments over a stream.

As in `flows.pay`, the order is sign, save, send, compare. Payments are sent in frames. The record that is saved before
a frame is sent holds the frame's newest payment, which includes all earlier ones. So the record always covers the
payments in flight. If the stream breaks or the server refuses, that newest payment is sent by `PUT`; it pays for the
whole frame, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import msgspec
from msgspec import UNSET, Struct

from paychan.client.errors import CountedLess, ServerMisbehaved
from paychan.client.flows import pay as paying
from paychan.client.flows.heal import proven_newest
from paychan.client.flows.pay import Receipt
from paychan.client.flows.verdict import need
from paychan.client.limits import Limits
from paychan.client.record import ChannelRecord, State
from paychan.client.spend import next_change
from paychan.client.transport import routes
from paychan.client.transport.answers import printable
from paychan.client.transport.effects import (
    Connect,
    Connected,
    Flow,
    Patience,
    Pause,
    Receive,
    Received,
    Response,
    Save,
    Send,
)
from paychan.protocol.errors import Malformed
from paychan.protocol.payment import PaymentSigner
from paychan.protocol.types import Sat
from paychan.protocol.wire.payment_frames import Said, Taken, read_answers, write_payments
from paychan.protocol.wire.rbpcp import ChannelStatus, PaymentResult

Watcher: TypeAlias = Callable[[int], object]
"""Called with the number of payments made so far."""

_FRAME_PAYMENTS = 64
_FRAMES_IN_FLIGHT = 2
"""The client signs and saves one frame while the server handles the other."""

_replace = msgspec.structs.replace


class Series(Struct, frozen=True):
    """`times` payments of `amount_sat` each, `every_seconds` apart (0: without a pause)."""

    amount_sat: Sat
    times: int
    every_seconds: float = 0.0
    watcher: Watcher | None = None

    def tell(self, done: int) -> None:
        if self.watcher is not None:
            self.watcher(done)


class _Batch(Struct):
    """A frame that was sent: the change values of its payments, and the answers so far."""

    changes: Sequence[Sat]
    answers: list[Taken | Said]


def pay_series(
    record: ChannelRecord, series: Series, limits: Limits, patience: Patience
) -> Flow[tuple[int, Receipt | None]]:
    """Pay as much of a series as a stream allows; return the number of payments made, and the last receipt.

    The receipt is None if the channel or the server has no stream. The caller makes the remaining payments by `PUT`,
    which also reports why a payment is not possible.

    Raises:
        OverLimit, InsufficientFunds, WouldLeaveDust: before anything is signed; see `flows.pay.pay`.
        ServerMisbehaved: an answer contradicts the signed payments.
        Refused, Unreachable: `PUT` failed as well; the payment is kept for `resume`.
    """
    need(record, State.OPEN)
    if record.unacknowledged:
        return 0, None
    next_change(record, series.amount_sat, limits, drain=False)
    if record.version != 2 or not isinstance((yield Connect(routes.stream_url(record), record.secret)), Connected):
        return 0, None
    return (yield from _Run(record, series, patience).flow())


class _Run:
    """The run of one series over one stream."""

    def __init__(self, record: ChannelRecord, series: Series, patience: Patience) -> None:
        self._record, self._series, self._patience = record, series, patience
        self._signer: PaymentSigner = record.signer()
        self._amount = series.amount_sat
        self._to_sign = min(series.times, (record.left_sat - record.dust_sat) // series.amount_sat)
        self._in_flight: deque[_Batch] = deque()
        self._done, self._said, self._again = 0, "", Sat(0)
        self._one_by_one = series.every_seconds > 0

    def flow(self) -> Flow[tuple[int, Receipt | None]]:
        while self._to_sign or self._in_flight:
            while self._to_sign and len(self._in_flight) < (1 if self._one_by_one else _FRAMES_IN_FLIGHT):
                yield from self._send()
            if not (yield from self._receive()):
                return (yield from self._by_put())
            if self._one_by_one and self._to_sign:
                yield Pause(self._series.every_seconds)
        yield Save(self._record)
        return self._done, self._receipt()

    def _send(self) -> Flow[None]:
        """Sign a frame, save its newest payment, and send it."""
        count = 1 if self._one_by_one else min(_FRAME_PAYMENTS, self._to_sign)
        left = self._record.left_sat
        changes = [Sat(left - self._amount * number) for number in range(1, count + 1)]
        frame = write_payments([self._signer.payment(change) for change in changes])
        self._to_sign -= count
        self._record = _replace(self._record, signed_sat=changes[-1], application_data="")
        yield Save(self._record)
        self._in_flight.append(_Batch(changes, []))
        yield Send(frame)

    def _receive(self) -> Flow[bool]:
        """Read answers until the oldest frame has all; False if the stream broke or a payment was refused."""
        batch = self._in_flight[0]
        while len(batch.answers) < len(batch.changes):
            came = yield Receive()
            if not isinstance(came, Received):
                return False
            self._assign(_read(came.frame))
        if any(isinstance(answer, Said) and not self._is_yes(answer) for answer in batch.answers):
            return False
        self._in_flight.popleft()
        for change, answer in zip(batch.changes, batch.answers, strict=True):
            self._compare(change, answer)
        self._done += len(batch.changes)
        self._record = _replace(self._record, acknowledged_sat=batch.changes[-1], refused=False)
        self._series.tell(self._done)
        return True

    def _assign(self, answers: list[Taken | Said]) -> None:
        """Assign answers to the frames that were sent; answers arrive in the order of the payments."""
        rest = iter(answers)
        for batch in self._in_flight:
            batch.answers.extend(
                answer for _, answer in zip(range(len(batch.changes) - len(batch.answers)), rest, strict=False)
            )
        if next(rest, None) is not None:
            raise ServerMisbehaved(
                what="answers of the stream", got=f"{len(answers)} and more", want="one for each payment"
            )

    def _is_yes(self, said: Said) -> bool:
        return said.status == 200

    def _compare(self, change: Sat, answer: Taken | Said) -> None:
        """Compare an answer with the signed payment."""
        left, value = (answer.change_sat, answer.value_sat) if isinstance(answer, Taken) else self._result(answer)
        if left != change:
            raise ServerMisbehaved(what="channel_value_left", got=left, want=change)
        if 0 <= value < self._amount:
            raise CountedLess(
                what="value_received",
                got=value,
                want=self._amount,
                total_sat=self._record.paid_sat,
                left_sat=self._record.left_sat,
            )
        if not self._amount <= value <= self._record.funding_sat - change:  # more: see `answers.check_result`
            raise ServerMisbehaved(what="value_received", got=value, want=self._amount)
        self._again = Sat(self._again + value - self._amount)

    def _result(self, said: Said) -> tuple[int, int]:
        try:
            result = msgspec.json.decode(said.body, type=PaymentResult)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ServerMisbehaved(what="result", got=str(error)[:120], want="the documented JSON object") from None
        if result.channel_status is not ChannelStatus.OPEN:
            raise ServerMisbehaved(what="channel_status", got=result.channel_status.value, want="open")
        self._said = "" if result.application_data is UNSET else result.application_data
        return result.channel_value_left, result.value_received

    def _by_put(self) -> Flow[tuple[int, Receipt | None]]:
        """Send the newest payment by `PUT`, which handles busy servers, moved and ended channels, and refusals."""
        record, newest = self._record, self._newest_elsewhere()
        _, receipt = yield from paying.transfer(record, self._patience, range(record.pending_sat + 1))
        if not receipt.taken_over_sat:
            self._done += sum(change < newest for batch in self._in_flight for change in batch.changes)
        self._series.tell(self._done)
        taken_over = Sat(receipt.taken_over_sat or record.agreed_sat - min(newest, record.agreed_sat))
        again = Sat(self._again + receipt.again_sat)
        return self._done, _replace(receipt, paid_sat=self._amount, again_sat=again, taken_over_sat=taken_over)

    def _newest_elsewhere(self) -> Sat:
        """Return the change value of the newest payment that another copy of this wallet made, if a refusal proves it.

        Payments in flight that leave as much or more paid nothing. Without such a refusal, return the whole funding.
        """
        refusals = [Response(each.status, "", {}, each.body) for each in self._answers() if isinstance(each, Said)]
        proven = [newest for each in refusals if (newest := proven_newest(self._record, each)) is not None]
        return max(proven, default=self._record.funding_sat)

    def _answers(self) -> Iterator[Taken | Said]:
        return (answer for batch in self._in_flight for answer in batch.answers)

    def _receipt(self) -> Receipt:
        record = self._record
        return Receipt(self._amount, record.paid_sat, record.left_sat, False, "", self._said, self._again)


def _read(frame: bytes) -> list[Taken | Said]:
    try:
        return read_answers(frame)
    except Malformed as error:
        raise ServerMisbehaved(what="frame", got=printable(error)[:120], want="the documented layout") from None


def pay_later(
    record: ChannelRecord, last: Receipt | None, series: Series, limits: Limits, patience: Patience, data: str
) -> Flow[Receipt]:
    """Pause, then pay the next of a series by `PUT`; the receipt includes what the `last` one says of all before."""
    if last is not None and series.every_seconds:
        yield Pause(series.every_seconds)
    receipt = yield from paying.pay(record, series.amount_sat, limits, patience, drain=False, application_data=data)
    if last is None:
        return receipt
    again_sat = Sat(receipt.again_sat + last.again_sat)
    earlier = last.earlier or receipt.earlier
    return _replace(receipt, again_sat=again_sat, reopened=receipt.reopened or last.reopened, earlier=earlier)
