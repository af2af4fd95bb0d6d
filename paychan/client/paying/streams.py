"""Pay for an answer while it is read: `Stream` has the sums, `top_up` pays the next units by a second request.

    read: units used up, or `payment-need-voucher` ──▶ budget ──▶ lock the channel, log, save, sign ──▶ HEAD of the same URL

The units of one answer are one request to the budget: `per_request` and `approve` see the sum. A payment whose answer was
lost is sent again as it was. Several steps without a unit between them end the answer: that server takes and gives nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator
from functools import partial
from hashlib import sha256
from typing import Any

import msgspec

from paychan.client.errors import ChannelInUse, ClientError, Declined, InsufficientFunds, NotApproved, WouldLeaveDust
from paychan.client.paying import paying
from paychan.client.paying.account import Corrected, Paid
from paychan.client.paying.budget import Question
from paychan.client.paying.demands import read_demands, read_outcome
from paychan.client.paying.errors import BodyUnpaid
from paychan.client.paying.exchange import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Answer,
    Bill,
    Call,
    Done,
    Effect,
    Pause,
    Purse,
    Try,
    Work,
)
from paychan.client.paying.metering import METERED_UNITS, Count, Final, Need
from paychan.client.paying.paying import Plan, Request
from paychan.client.record import ChannelRecord
from paychan.client.wallet import ChannelFile
from paychan.protocol.types import Sat

_MOST_IN_VAIN = 3
"""Payments without a unit between them. One or two happen if other requests use up the credit of the channel."""

_TRIES = 2
_NO_BODY = sha256(b"").digest()

_replace = msgspec.structs.replace

Steps = Generator[Effect, Any, None]


class Stream:
    """One answer that is paid by units. `bill` is the newest sum; threads may not share it.

    Args:
        purse: the wallet that pays.
        request: the program's request.
        done: its first payment.
        clock: counts seconds, for a price by the second.
    """

    def __init__(self, purse: Purse, request: Request, done: Done, clock: Callable[[], float] = time.monotonic) -> None:
        offer = done.plan.demand.offer
        self.purse, self.bill, self.clock = purse, done.bill, clock
        self.demand, self.unit, self.unit_sat = done.plan.demand, offer.unit, offer.amount_sat
        self.record, self._request = done.plan.record, request
        self.count = Count(offer.unit, done.headers, clock())
        self.covered = done.bill.price_sat // offer.amount_sat
        self._settled_units = 1
        outcome = read_outcome(done.headers)
        if outcome is not None and outcome[0].state.channel == self.record.outpoint:
            self._cover(1 + outcome[0].state.credit_sat // offer.amount_sat)
        self._name, self._step, self._in_vain, self._units_before = secrets.token_bytes(16), 0, 0, 0

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def must_pay(self) -> bool:
        """Whether the next read may wait for a payment."""
        return self.count.must_pay(self.covered, self.clock())

    @property
    def seconds_left(self) -> float | None:
        """Time until the next payment while a read waits; None if a read never has to be interrupted."""
        return self.count.seconds_left(self.covered, self.clock())

    def feed(self, raw: bytes) -> list[bytes | Need]:
        """Count a chunk; return its parts for the program, and the places where a payment is asked for."""
        found: list[bytes | Need] = []
        for part in self.count.feed(raw):
            if isinstance(part, Final):
                self._finish(part)
            else:
                found.append(part)
        return found

    def end(self) -> bytes:
        """Note that the body has ended; return its last bytes."""
        if self.count.events is not None:
            return self.count.events.rest()
        more = self.count.units(self.clock()) - self._settled_units
        if more > 0:
            channel = self.record.funding_outpoint
            spent = self.purse.log.account().spent.get(channel)
            if spent is not None:
                self._correct(spent + more * self.unit_sat)
        return b""

    def _finish(self, final: Final) -> None:
        settled = final.settled
        if settled is not None and settled.state.channel == self.record.outpoint:
            self.bill = _replace(self.bill, charged_sat=settled.charged_sat)
            self._correct(paying.charges_sat(settled.state))

    def _correct(self, spent_sat: int) -> None:
        self.purse.log.note(Corrected(self.record.funding_outpoint, self.purse.now, spent_sat))

    def _cover(self, units: int) -> None:
        self.covered = max(self.covered, units)

    # --- paying -------------------------------------------------------------------------------------------------------

    @property
    def step_sat(self) -> int:
        """Sum of the next payment: `Purse.units` units."""
        return self.unit_sat * self.purse.units

    @property
    def voucher_request(self) -> Request:
        """The second request. Its key is the same for each try of one step, and no other request has it."""
        asked = self._request
        digest = sha256(self._name + self._step.to_bytes(8, "little")).digest()
        return Request("HEAD", asked.url, asked.host, asked.names - {"idempotency-key"}, digest)

    def unpaid(self, error: Exception) -> BodyUnpaid:
        """Return the error that ends the body."""
        return BodyUnpaid(
            url=self._request.url,
            delivered=self.count.units(self.clock()),
            unit=self.unit,
            paid_sat=self.bill.price_sat,
            reason=str(error) or type(error).__name__,
            cause=error.code if isinstance(error, ClientError) else "",
        )

    def allowed(self) -> Declined | None:
        """Say why the budget does not cover the next step."""
        purse, paid_sat = self.purse, self.bill.price_sat
        total_sat = paid_sat + self.step_sat
        problem = purse.log.problem(purse.budget, self._request.host, total_sat, purse.now, paid_sat)
        return None if problem is None else purse.declined(self.voucher_request, total_sat, problem)

    def question(self) -> Question:
        asked = self._request
        return Question(asked.host, asked.method, asked.url, self.bill.price_sat + self.step_sat)

    def take(self) -> tuple[ChannelFile, Plan] | Declined | None:
        """Lock the channel of the answer and plan the payment; None if another program uses it."""
        try:
            file, record = self.purse.wallet.open(self.record.name)
        except ChannelInUse:
            return None
        try:
            plan = self._plan(record)
        except BaseException:
            file.release()
            raise
        if isinstance(plan, Plan):
            return file, plan
        file.release()
        return self.purse.declined(self.voucher_request, self.step_sat, plan)

    def _plan(self, record: ChannelRecord) -> Plan | Declined:
        purse, request = self.purse, self.voucher_request
        if record.funding_outpoint != self.record.funding_outpoint or not paying.pays(
            record, self.demand.offer, purse.now
        ):
            return paying.no_channel(self.demand)
        account = purse.log.account()
        record = paying.with_decided(record, account)
        earlier = account.open.get(request.key)
        raised_sat = 0 if earlier is not None else self.step_sat
        change_sat = record.left_sat - raised_sat
        if change_sat < 0:
            return InsufficientFunds(want_sat=raised_sat, left_sat=record.left_sat)
        if raised_sat and change_sat < record.dust_sat:
            most_sat = max(0, record.left_sat - record.dust_sat)
            return WouldLeaveDust(change_sat=change_sat, dust_sat=record.dust_sat, most_sat=most_sat)
        paid = Paid(
            request=secrets.token_urlsafe(18) if earlier is None else earlier.request,
            key=request.key,
            at=purse.now,
            host=request.host,
            method=request.method,
            url=request.url,
            channel=record.funding_outpoint,
            price_sat=self.step_sat,
            change_sat=Sat(change_sat),
            counted_sat=self.step_sat if earlier is None else 0,
            raised_sat=self.step_sat,
        )
        return Plan(self.demand, _replace(record, signed_sat=Sat(change_sat)), paid)

    def sign(self, file: ChannelFile, plan: Plan) -> Any:
        """Count the step, save it, and sign it; the budget sees the sum of the whole answer."""
        paid = plan.paid
        whole = _replace(plan, paid=_replace(paid, price_sat=self.bill.price_sat + paid.price_sat))
        return self.purse.sign(self.voucher_request, file, whole)

    def book(self, file: ChannelFile, plan: Plan, answer: Answer) -> None:
        """Note that the server took the step."""
        booked: Bill = self.purse.book(file, plan, answer)
        self.bill = _replace(
            self.bill,
            price_sat=self.bill.price_sat + plan.paid.price_sat,
            signed_sat=self.bill.signed_sat + booked.signed_sat,
            left_sat=booked.left_sat,
        )
        self.record, self._step = plan.record, self._step + 1
        self._settled_units = max(self._settled_units, self.covered)
        units, outcome = self.count.units(self.clock()), read_outcome(answer.headers)
        credit_sat = 0 if outcome is None else outcome[0].state.credit_sat
        self.covered += plan.paid.price_sat // self.unit_sat
        self._cover(units + credit_sat // self.unit_sat)
        self._in_vain = 0 if units > self._units_before else self._in_vain + 1
        self._units_before = units

    def renewed(self, plan: Plan, answer: Answer) -> Plan | None:
        """Answer a newer challenge at the same price with the same payment."""
        for demand in read_demands(answer.headers, plan.demand.protocol, self.purse.units):
            if demand.protocol == plan.demand.protocol and demand.offer == self.demand.offer:
                self.demand = demand
                return _replace(plan, demand=demand)
        return None

    @property
    def in_vain(self) -> bool:
        return self._in_vain >= _MOST_IN_VAIN


class NothingDelivered(ClientError):
    """A server took payments for an answer and sent nothing for them."""

    code, text = "nothing_delivered", "the server took {payments} payments and sent no unit between them"


def stream_of(purse: Purse, request: Request, done: Done | None) -> Stream | None:
    """Return the stream of an answer that is paid by units; None for any other."""
    if done is None or request.method == "HEAD" or not done.bill.charged_sat:
        return None
    return Stream(purse, request, done) if done.plan.demand.offer.unit in METERED_UNITS else None


def top_up(stream: Stream) -> Steps:
    """Pay the next units of an answer.

    Raises:
        BodyUnpaid: they can't be paid; what was paid and delivered is in it.
    """
    try:
        yield from _top_up(stream)
    except BodyUnpaid:
        raise
    except Exception as error:
        raise stream.unpaid(error) from error


def _top_up(stream: Stream) -> Steps:
    if stream.in_vain:
        raise NothingDelivered(payments=_MOST_IN_VAIN)
    problem = yield Work(stream.allowed)
    if problem is not None:
        raise problem
    question, budget = stream.question(), stream.purse.budget
    if (
        budget.approve is not None
        and budget.asks(question.price_sat)
        and (yield Call(partial(budget.approve, question))) is not True
    ):
        refusal = NotApproved(host=question.host, price_sat=question.price_sat)
        raise (yield Work(partial(stream.purse.declined, stream.voucher_request, question.price_sat, refusal)))
    file, plan = yield from _take(stream)
    try:
        yield from _send(stream, file, plan)
    finally:
        file.release()


def _take(stream: Stream) -> Generator[Effect, Any, tuple[ChannelFile, Plan]]:
    waited, pause = 0.0, FIRST_PAUSE_SECONDS
    while True:
        taken: tuple[ChannelFile, Plan] | Declined | None = yield Work(stream.take)
        if isinstance(taken, Declined):
            raise taken
        if taken is not None:
            return taken
        if waited >= stream.purse.time_limit_seconds:
            raise ChannelInUse(name=stream.record.name)
        yield Pause(pause)
        waited, pause = waited + pause, min(2 * pause, LONGEST_PAUSE_SECONDS)


def _send(stream: Stream, file: ChannelFile, plan: Plan) -> Steps:
    for left in reversed(range(_TRIES)):
        headers = yield Work(partial(stream.sign, file, plan))
        if isinstance(headers, Declined):
            raise headers
        try:
            answer: Answer = yield Try(headers)
        except Exception:
            if not left:
                raise
            plan = _replace(plan, paid=_replace(plan.paid, counted_sat=0))
            continue
        if answer.status < 300:
            yield Work(partial(stream.book, file, plan, answer))
            return
        again = None
        if answer.status == 402 and left:
            again = yield Work(partial(stream.purse.correct, file, plan, answer))
            again = again or stream.renewed(plan, answer)
        if again is None:
            raise (yield Work(partial(stream.purse.unpaid, file, plan, answer)))
        plan = _replace(again, paid=_replace(again.paid, counted_sat=0))
