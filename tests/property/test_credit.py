"""Credit: what requests are charged and get back, over random histories, against a model of plain integers."""

from __future__ import annotations

from functools import cache
from random import Random

import msgspec

from paychan.protocol.channel import (
    Accepted,
    Answer,
    Channel,
    Close,
    CloseReason,
    Outcome,
    Pay,
    Published,
    Rejected,
    Signed,
    State,
    View,
)
from paychan.protocol.charges import Charge, Delivered, Release
from paychan.protocol.credit import ABANDONED_SECONDS, KEPT_SECONDS, MOST_KEPT, MOST_UNDER_WAY, find_delivery
from paychan.protocol.opening import open_channel, successor
from paychan.protocol.payment import Payment
from paychan.protocol.record import decode_record, encode_record
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.unpaid import CreditTooLow, TooManyDeliveries
from tests.lib import campaign
from tests.lib.channels import RULES, VIEW, Payer, accepted, confirmed, step
from tests.lib.looped import looped

HISTORIES = campaign.sized(1_200, 100_000)
STEP_SAT = 100
PAYER = Payer("credit", funding_sat=Sat(10_000))
OTHER = Payer("another client", funding_sat=Sat(10_000))
REQUESTS = [bytes([number]) * 16 for number in range(6)]


@cache
def payment(change_sat: int, payer: Payer = PAYER) -> Payment:
    """A signed payment; histories share it."""
    return payer.payment(change_sat)


def opened() -> Channel:
    return PAYER.channel(Sat(1_000))


def later(seconds: int) -> View:
    return View(UnixTime(VIEW.now + seconds), RULES)


@looped("number", range(4))
def test_invariants_over_random_histories(number: int) -> None:
    """Spent is at most accepted, and accepted at most the funding; no request is charged twice, and none is free."""
    random = Random(number)
    for _ in range(HISTORIES // 4):
        _live(random)


def _live(random: Random) -> None:
    """A channel and its model: change value, spent value and charged requests as plain integers."""
    channel = opened()
    change, spent, charged = 9_000, 1_000, dict[bytes, int]()
    for _ in range(random.randint(1, 12)):
        request, before = random.choice(REQUESTS), channel
        match random.randrange(6):
            case 0 | 1:  # a request, mostly with a payment
                new = max(change - STEP_SAT * random.choice((-1, 0, 0, 1, 2, 5)), 600)
                total = random.choice((50, 100, 200, 500))
                comes = random.random() < 0.7
                forged = comes and random.random() < 0.1
                paid = payment(new, OTHER if forged else PAYER) if comes else None
                outcome = apply(channel, Charge(request, Sat(total), paid), VIEW)
                after = new if comes else change
                extra = max(total - charged.get(request, 0), 0)
                is_fine = not (forged and new != change) and not forged and after <= change
                if is_fine and 10_000 - after - spent >= extra:
                    assert isinstance(outcome, Accepted), outcome
                    assert outcome.value_sat == change - after
                    change, spent = after, spent + extra
                    charged[request] = max(total, charged.get(request, 0))
                else:
                    assert isinstance(outcome, Rejected)
            case 2:  # less was delivered
                to = random.choice((0, 0, 25, 100))
                outcome = apply(channel, Release(request, Sat(to)), VIEW)
                assert isinstance(outcome, Accepted) == (request in charged)
                if request in charged and charged[request] > to:
                    spent -= charged[request] - to
                    charged[request] = to
                    if not to:
                        del charged[request]
            case 3:
                outcome = apply(channel, Delivered(frozenset([request])), VIEW)
            case 4:  # a crash: what was not answered is repeated
                channel = decode_record(encode_record(channel))
                outcome = Accepted(channel)
            case _:  # a payment without a request
                new = max(change - STEP_SAT, 600)
                outcome = apply(channel, Pay(payment(new)), VIEW)
                assert isinstance(outcome, Accepted)
                change = new
        channel = outcome.channel if isinstance(outcome, Accepted) else channel
        assert (channel.payment.change_sat, channel.spent_sat) == (change, spent)
        assert {each.request: each.charged_sat for each in channel.deliveries} == charged
        assert 0 <= channel.spent_sat <= channel.accepted_sat <= channel.funding_sat
        assert channel.accepted_sat >= before.accepted_sat
        assert channel.seq - before.seq in (0, 1)


def charge(channel: Channel, request: bytes, total: int, change: int | None = None, view: View = VIEW) -> Outcome:
    return apply(channel, Charge(request, Sat(total), None if change is None else payment(change)), view)


def test_a_refused_charge_books_no_payment() -> None:
    """Payment and charge are one step: the payment of a request that it does not cover changes nothing."""
    channel = opened()
    assert charge(channel, REQUESTS[0], 101, 8_900) == Rejected(CreditTooLow(got_sat=100, need_sat=101))


def test_requests_are_answered_as_often_as_they_were_paid() -> None:
    """Of ten requests at once with the payment for three, three are charged."""
    channel, answered = opened(), 0
    for number in range(10):
        outcome = charge(channel, bytes([number]) * 16, 100, 8_700)
        if isinstance(outcome, Accepted):
            channel, answered = outcome.channel, answered + 1
    assert (answered, channel.credit_sat) == (3, 0)


def test_a_metered_request_is_charged_the_difference() -> None:
    """A total that rises is charged by what is new; the same total again costs nothing."""
    channel = accepted(charge(opened(), REQUESTS[0], 50, 8_800))
    channel = accepted(charge(channel, REQUESTS[0], 120))
    assert charge(channel, REQUESTS[0], 120) == Accepted(channel)
    assert (channel.spent_sat, channel.credit_sat) == (1_120, 80)


def test_the_last_payment_of_a_channel_pays_its_request() -> None:
    """A payment that leaves no change closes the channel, and its request is charged and can still be released."""
    channel = accepted(charge(opened(), REQUESTS[0], 9_000, 0))
    assert (channel.state, channel.spent_sat) == (State.CLOSING, 10_000)
    assert step(channel, Release(REQUESTS[0])).spent_sat == 1_000
    assert isinstance(charge(channel, REQUESTS[1], 0), Rejected)


def test_openings_and_the_applications_payments_are_no_credit() -> None:
    """Another door has delivered for them, or they are the price of the opening."""
    channel = opened()
    assert channel.credit_sat == 0
    asking = View(VIEW.now, msgspec.structs.replace(RULES, asks_application=True))
    asked = accepted(apply(channel, Pay(payment(8_000)), asking))
    assert asked.credit_sat == 0
    assert accepted(apply(asked, Answer(), asking)).credit_sat == 0
    assert accepted(apply(channel, Charge(REQUESTS[0], Sat(1), payment(8_000)), asking)).credit_sat == 999


def test_the_first_payment_on_a_record_from_a_backup_brings_no_credit() -> None:
    """The record lacks what was charged since: the payment pays for its own request, and for nothing else."""
    saved = accepted(charge(opened(), REQUESTS[0], 50, 8_800))
    restored = msgspec.structs.replace(saved, restored=True)
    assert charge(restored, REQUESTS[1], 100) == Rejected(CreditTooLow(got_sat=0, need_sat=100))
    assert charge(restored, REQUESTS[1], 401, 8_400) == Rejected(CreditTooLow(got_sat=400, need_sat=401))
    after = accepted(charge(restored, REQUESTS[1], 100, 8_400))
    assert (after.credit_sat, after.restored) == (0, False)
    assert step(after, Release(REQUESTS[1])).credit_sat == 100
    by_rest = accepted(apply(restored, Pay(payment(8_400)), VIEW))
    assert by_rest.credit_sat == 0
    assert isinstance(charge(by_rest, REQUESTS[1], 1), Rejected)


def test_credit_goes_along_when_the_channel_moves() -> None:
    """A withdrawal takes what was received; credit and charges continue at the next output."""
    mover = Payer("credit that moves", movable=True)
    channel = accepted(open_channel(msgspec.structs.replace(mover.opening(), secret=bytes(32)), VIEW))
    paid = mover.payment(channel.payment.change_sat - 5_000)
    channel = step(channel, Charge(REQUESTS[0], Sat(3_000), paid))
    moving = step(channel, Close(CloseReason.WITHDRAW))
    moving = step(step(moving, Signed(mover.settlement(moving))), Published())
    moving = step(moving, confirmed(moving))
    after = successor(moving, VIEW.now)
    assert (after.credit_sat, after.received_sat) == (2_000, 0)
    assert after.accepted_sat == channel.accepted_sat
    assert step(after, Release(REQUESTS[0])).credit_sat == 5_000
    assert isinstance(apply(moving, Release(REQUESTS[0]), VIEW), Rejected)


def test_answered_requests_are_forgotten_and_others_are_not() -> None:
    """The record stays small; a request under way stays known, for its charge may come back."""
    channel = accepted(charge(opened(), REQUESTS[0], 1, 8_000))
    channel = step(channel, Delivered(frozenset([REQUESTS[0]])))
    channel = accepted(charge(channel, REQUESTS[1], 1))
    assert find_delivery(accepted(charge(channel, REQUESTS[2], 1, view=later(KEPT_SECONDS))), REQUESTS[0])
    aged = accepted(charge(channel, REQUESTS[2], 1, view=later(KEPT_SECONDS + 1)))
    assert [each.request for each in aged.deliveries] == REQUESTS[1:3]
    old = accepted(charge(channel, REQUESTS[2], 1, view=later(ABANDONED_SECONDS + 1)))
    assert [each.request for each in old.deliveries] == REQUESTS[2:3]

    ids = [number.to_bytes(16, "big") for number in range(MOST_KEPT + 2)]
    for each in ids:
        channel = step(channel, Charge(each, Sat(1), None, frozenset([each])))
        channel = step(channel, Delivered(frozenset([each])))
    kept = [each.request for each in channel.deliveries]
    assert kept == [REQUESTS[1], *ids[2:]]


def test_a_channel_has_a_limit_of_requests_under_way() -> None:
    """The next one is refused with both numbers, and is charged when another one was answered."""
    channel = accepted(charge(opened(), bytes(16), 1, 8_000))
    for number in range(1, MOST_UNDER_WAY):
        channel = accepted(charge(channel, number.to_bytes(16, "big"), 1))
    one_more = b"\xff" * 16
    refused = TooManyDeliveries(got=MOST_UNDER_WAY, limit=MOST_UNDER_WAY)
    assert charge(channel, one_more, 1) == Rejected(refused)
    assert isinstance(apply(channel, Charge(one_more, Sat(1), None, frozenset([bytes(16)])), VIEW), Accepted)
    assert len(encode_record(channel)) < 16_000
