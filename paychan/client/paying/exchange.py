"""The steps of a paid request, as a generator of effects: the adapters for httpx, requests and aiohttp perform them.

    send unpaid; 402: choose, ask, lock the channel, count and log, save, sign, send; read the answer, note it

The channel's file stays locked from the decision to the head of the answer, so two programs never sign over one channel at
the same time. Whatever fails after the signature, the log has the payment, and the same request sends it again.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

from msgspec import Struct

from paychan.client.amounts import whole
from paychan.client.errors import (
    BodyNotRepeatable,
    ChannelInUse,
    ClientError,
    Declined,
    FalseProof,
    NotApproved,
    StillUnpaid,
)
from paychan.client.paying import paying
from paychan.client.paying.account import Answered, Corrected, Unpaid, declination, kept_receipt, shortened
from paychan.client.paying.budget import Budget, Question
from paychan.client.paying.demands import (
    Demand,
    Headers,
    Protocol,
    read_corrections,
    read_demands,
    read_outcome,
    read_problem,
)
from paychan.client.paying.paying import Plan, Request
from paychan.client.paying.spending import SpendingLog
from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import TIME_LIMIT_SECONDS, Patience
from paychan.client.wallet import ChannelFile, Wallet
from paychan.protocol.errors import PaychanError

_LOOK_SECONDS = 10.0
"""Longest question to a channel's own server, after a seller said that the channel has ended."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.005, 0.1


class Try(Struct, frozen=True):
    """Send the request with these headers added."""

    headers: Headers = ()


class Answer(Struct, frozen=True):
    """Head of an answer; the body only of a 402."""

    status: int
    headers: Headers
    """Names in lower case."""
    body: bytes = b""


class Work(Struct, frozen=True):
    """Call this function, which may block for a moment: it reads and writes files."""

    call: Callable[[], Any]


class Call(Struct, frozen=True):
    """Call a function of the program, which may be a coroutine function and may take long."""

    call: Callable[[], Any]


class Pause(Struct, frozen=True):
    """Wait for this many seconds."""

    seconds: float


Effect: TypeAlias = Try | Work | Call | Pause


class Bill(Struct, frozen=True):
    """The price of a paid request, and what became of it; amounts in satoshi."""

    host: str
    """`host:port`, as requested."""
    price_sat: int
    """The agreed price, which the budget counts."""
    charged_sat: int
    """The server's charge, as its receipt says; the price without a receipt."""
    signed_sat: int
    """Sum by which the payments of the channel grew; less than the price if credit paid a part."""
    channel: str
    """Name of the channel in the wallet."""
    left_sat: int
    """Sum that is left in the channel."""
    receipt: str = ""
    """`PAYMENT-RESPONSE` or `Payment-Receipt`, as received; "" if there was none."""


class Done(Struct, frozen=True):
    """A request that was paid and answered."""

    bill: Bill
    plan: Plan
    headers: Headers
    """Headers of the answer."""


Exchange: TypeAlias = Generator[Effect, Any, "Bill | None"]


class Need(Struct, frozen=True):
    """A channel that is missing."""

    pay_url: str
    """Base URL of the server at which a channel is opened."""
    room_sat: int
    """Sum that it must be able to pay."""
    network: str
    """mainnet, testnet, signet or regtest, as the offer says."""


class Purse:
    """A wallet with a budget, for any number of clients and threads.

    Args:
        budget: limits of all payments.
        wallet: directory of the channels; default as for `Payer`.
        open_channel: called with a `Need` if no channel of the wallet pays a server; it may open one. Default: a request
            without a channel raises `NoChannel`.
        prefer: the protocol to answer if a 402 has both.
        units: number of units to pay for before an answer that is priced by event, second, kilobyte or the like. What
            the answer does not use up is credit for the next request.
        time_limit_seconds: longest wait for a channel that another program uses.
        clock: returns the Unix time.
    """

    def __init__(
        self,
        budget: Budget,
        wallet: str | os.PathLike[str] | None = None,
        *,
        open_channel: Callable[[Need], Any] | None = None,
        prefer: Protocol = "x402",
        units: int = 1,
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.budget, self.wallet, self.open_channel = budget, Wallet(wallet), open_channel
        self.log = SpendingLog(self.wallet.directory)
        self.units = _units(units)
        self.prefer, self.time_limit_seconds, self._clock = prefer, time_limit_seconds, clock

    @property
    def now(self) -> int:
        return int(self._clock())

    def declined(self, request: Request, price_sat: int, error: Declined) -> Declined:
        """Log a payment that is not made, and return the error to raise."""
        self.log.note(declination(error, self.now, request.host, request.method, request.url, price_sat))
        return error

    def first_look(self, request: Request, price_sat: int) -> Declined | None:
        """Compare the budget with the sums so far: a price that is certainly too high needs no question and no channel."""
        account = self.log.account()
        earlier = account.open.get(request.key)
        before_sat = min(price_sat, earlier.price_sat) if earlier else 0
        return self.log.problem(self.budget, request.host, price_sat, self.now, before_sat)

    def is_agreed(self, request: Request, price_sat: int) -> bool:
        """Say whether an earlier try of this request was allowed at this price."""
        earlier = self.log.account().open.get(request.key)
        return earlier is not None and price_sat <= earlier.price_sat

    def candidates(self, request: Request, demands: list[Demand]) -> list[tuple[Demand, ChannelRecord]]:
        """Return the channels that may pay, the best first."""
        records, _ = self.wallet.read_all()
        return paying.choose(demands, records, self.log.account(), request.key, self.now)

    def changed_identity(self, request: Request, demands: list[Demand]) -> Declined | None:
        """Return why an offer is not that of the server that it names, or None."""
        return paying.changed_identity(demands, self.wallet.read_all()[0], request.host)

    def take(
        self, request: Request, candidates: list[tuple[Demand, ChannelRecord]]
    ) -> tuple[ChannelFile, Plan] | Declined | None:
        """Lock a channel and plan the payment over it; None if other programs use all that would do."""
        problem: Declined | None = None
        is_busy = False
        for demand, seen in candidates:
            try:
                file, record = self.wallet.open(seen.name)
            except ChannelInUse:
                is_busy = True
                continue
            plan = self._plan(request, demand, record)
            if isinstance(plan, Plan):
                return file, plan
            file.release()
            problem = plan
        return None if is_busy else problem

    def _plan(self, request: Request, demand: Demand, record: ChannelRecord) -> Plan | Declined:
        if not paying.pays(record, demand.offer, self.now):  # it changed before it was locked
            return paying.no_channel(demand)
        account = self.log.account()
        if record.funding_outpoint not in account.spent:  # what was paid so far was for something else
            spent_sat = record.funding_sat - record.left_sat
            self.log.note(Corrected(record.funding_outpoint, self.now, spent_sat))
            account = self.log.account()
        record = paying.with_decided(record, account)
        return paying.plan(request, demand, record, account, self.now, secrets.token_urlsafe(18))

    def sign(self, request: Request, file: ChannelFile, plan: Plan) -> Headers | Declined:
        """Count the payment, save it, and sign it, in this order."""
        problem = self.log.spend(self.budget, plan.paid)
        if problem is not None:
            return problem
        file.save(plan.record)
        return plan.demand.headers(plan.voucher, plan.paid.request, request.names)

    def correct(self, file: ChannelFile, plan: Plan, answer: Answer) -> Plan | None:
        """Adopt the correction in a 402 if it is proven, and plan the second try. None if there is none to make.

        Raises:
            FalseProof: the proof is not by this wallet.
        """
        for demand in read_corrections(answer.headers, plan.demand):
            assert demand.state is not None
            try:
                record = paying.corrected(plan.record, demand.state, plan.paid.url)
            except FalseProof as error:
                self.log.note(Unpaid(plan.paid.request, self.now, error.code, shortened(str(error))))
                raise
            if record is not None:
                file.save(record)
                self.log.note(Corrected(plan.paid.channel, self.now, paying.charges_sat(demand.state)))
                return paying.replan(plan, demand, record, demand.state, self.now)
        return None

    def book(self, file: ChannelFile, plan: Plan, answer: Answer) -> Bill:
        """Note an answer other than 402. One that says nothing about the payment and failed leaves the request open."""
        outcome, paid, record = read_outcome(answer.headers), plan.paid, plan.record
        settled, receipt = outcome or (None, "")
        spent_sat, charged_sat = paying.spent_after(plan, settled, self.log.account())
        if outcome is not None or answer.status < 500:
            self.log.note(
                Answered(
                    paid.request, self.now, answer.status, paid.channel, spent_sat, charged_sat, kept_receipt(receipt)
                )
            )
            record = paying.acknowledged(plan, settled)
            file.save(record)
        return Bill(paid.host, paid.price_sat, charged_sat, paid.raised_sat, record.name, record.left_sat, receipt)

    def unpaid(self, file: ChannelFile, plan: Plan, answer: Answer) -> StillUnpaid:
        """Note a 402 on a paid request, and return the error to raise.

        If it says that the channel has ended, the wallet asks the channel's own server, and pays over another one next.
        """
        problem = read_problem(answer.headers, answer.body)
        self.log.note(Unpaid(plan.paid.request, self.now, problem.code, problem.reason))
        if paying.says_ended(problem.code):
            with suppress(ClientError, PaychanError):
                look_at(file, plan.record)
        return StillUnpaid(plan.paid.url, plan.paid.price_sat, problem.code, problem.reason)


def _units(number: int) -> int:
    number = whole(number, "units")
    if number < 1:
        msg = f"{number} units of an answer: want at least 1"
        raise ValueError(msg)
    return number


def look_at(file: ChannelFile, record: ChannelRecord) -> None:
    """Ask the server of a channel how it stands, and record that it has ended or moved.

    Raises:
        ClientError: see `Channel.status`.
    """
    import httpx

    from paychan.client.channel import Channel
    from paychan.client.channel_base import TransportSettings
    from paychan.client.transport.proxy import ProxyTransport

    settings = TransportSettings(patience=Patience(attempts=1), time_limit_seconds=_LOOK_SECONDS)
    with httpx.Client(transport=ProxyTransport(httpx.create_ssl_context)) as http:
        Channel(file, record, settings, http).status()


def exchange(purse: Purse, request: Request) -> Exchange:
    """Do what `exchange_whole` does; the result is the bill, or None if nothing was paid."""
    done = yield from exchange_whole(purse, request)
    return None if done is None else done.bill


def exchange_whole(purse: Purse, request: Request) -> Generator[Effect, Any, Done | None]:
    """Send a request, and pay for it if the answer is a 402 with an offer that this library understands.

    The last answer is that of the program. A 402 without such an offer is left to the program. The result is
    None if nothing was paid.

    Raises:
        Declined: the budget, `approve` or the wallet does not allow it; nothing was signed, and the log has the reason.
        StillUnpaid: the server did not take the payment.
        FalseProof: the server showed a payment that this wallet did not sign.
        ChannelInUse: other programs use the channels.
    """
    answer = yield Try()
    demands = read_demands(answer.headers, purse.prefer, purse.units) if answer.status == 402 else []
    if not demands:
        return None
    price_sat = demands[0].price_sat
    if request.body_digest is None:
        refusal = BodyNotRepeatable(host=request.host, price_sat=price_sat, limit_bytes=request.buffer_bytes)
        raise (yield Work(partial(purse.declined, request, price_sat, refusal)))
    yield from _allow(purse, request, price_sat)
    demands = [each for each in demands if each.price_sat <= price_sat]
    file, plan = yield from _take(purse, request, demands)
    try:
        return (yield from _pay(purse, request, file, plan))
    finally:
        file.release()


def _allow(purse: Purse, request: Request, price_sat: int) -> Generator[Effect, Any, None]:
    """Ask budget and program whether this price may be paid."""
    problem = yield Work(partial(purse.first_look, request, price_sat))
    if problem is not None:
        raise (yield Work(partial(purse.declined, request, price_sat, problem)))
    approve = purse.budget.approve
    if approve is None or not purse.budget.asks(price_sat):
        return
    if (yield Work(partial(purse.is_agreed, request, price_sat))):
        return
    if (yield Call(partial(approve, Question(request.host, request.method, request.url, price_sat)))) is not True:
        refusal = NotApproved(host=request.host, price_sat=price_sat)
        raise (yield Work(partial(purse.declined, request, price_sat, refusal)))


def _take(purse: Purse, request: Request, demands: list[Demand]) -> Generator[Effect, Any, tuple[ChannelFile, Plan]]:
    """Lock a channel that pays, and wait for one that another program uses; let the program open one if there is none."""
    waited, pause, opener, offer = 0.0, FIRST_PAUSE_SECONDS, purse.open_channel, demands[0].offer
    while True:
        candidates = yield Work(partial(purse.candidates, request, demands))
        taken: tuple[ChannelFile, Plan] | Declined | None = paying.no_channel(demands[0])
        else_known = None if candidates else (yield Work(partial(purse.changed_identity, request, demands)))
        if else_known is not None:
            raise (yield Work(partial(purse.declined, request, demands[0].price_sat, else_known)))
        if candidates:
            taken = yield Work(partial(purse.take, request, candidates))
        if isinstance(taken, tuple):
            return taken
        if isinstance(taken, Declined):
            if opener is None:
                raise (yield Work(partial(purse.declined, request, demands[0].price_sat, taken)))
            yield Call(partial(opener, Need(offer.pay_url, demands[0].price_sat, offer.network)))
            opener = None
            continue
        if waited >= purse.time_limit_seconds:
            raise ChannelInUse(name=", ".join(record.name for _, record in candidates))
        yield Pause(pause)
        waited, pause = waited + pause, min(2 * pause, LONGEST_PAUSE_SECONDS)


def _pay(purse: Purse, request: Request, file: ChannelFile, plan: Plan) -> Generator[Effect, Any, Done]:
    """Pay over a locked channel: one try, and one more after a correction."""
    may_correct = True
    while True:
        headers = yield Work(partial(purse.sign, request, file, plan))
        if isinstance(headers, Declined):
            raise headers
        answer = yield Try(headers)
        if answer.status != 402:
            bill: Bill = yield Work(partial(purse.book, file, plan, answer))
            return Done(bill, plan, answer.headers)
        again = (yield Work(partial(purse.correct, file, plan, answer))) if may_correct else None
        if again is None:
            raise (yield Work(partial(purse.unpaid, file, plan, answer)))
        plan, may_correct = again, False
