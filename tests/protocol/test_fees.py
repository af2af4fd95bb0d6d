"""Fees: the curve towards the deadline, the replacements, and the budget that limits both (threats 8 and 24)."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.channel import Accepted, Channel, Close, CloseByPayment, CloseReason, Rejected, View
from paychan.protocol.errors import ClosingFeeTooHigh
from paychan.protocol.expiry import Expiry
from paychan.protocol.fees import (
    ChainFees,
    Shortfall,
    able_to_pay,
    budget_sat,
    deadline,
    is_beyond_share,
    is_due,
    is_outbid,
    is_starved,
    is_urgent,
    most_offered_sat,
    most_sat,
    plan_child_fee,
    plan_closing,
    plan_fee,
    plan_reserve_fee,
    pressed,
    wanted_rate,
)
from paychan.protocol.settlement import CHILD_BYTES, Coin, Reserve, Settlement, settlement_size
from paychan.protocol.state_machine import apply
from paychan.protocol.types import OutPoint, Sat, UnixTime
from tests.lib.channels import NOW, RULES, SERVER_DESTINATION, Payer, private_key, step
from tests.lib.looped import looped

HOUR = 3600
WINDOW = 4 * HOUR
rules = msgspec.structs.replace(
    RULES, fee_sat_per_vb=10, max_fee_sat_per_vb=210, fee_share_percent=50, deadline_margin_seconds=2 * HOUR
)
EXPIRY = UnixTime(NOW + WINDOW + 2 * HOUR)
CLOSING = step(Payer("fees").channel(), Close(CloseReason.OPERATOR))
CLOSING = msgspec.structs.replace(CLOSING, terms=msgspec.structs.replace(CLOSING.terms, expiry=Expiry(EXPIRY)))
RESERVE = Reserve(private_key("reserve").public_key.format(), (Coin(OutPoint(b"\x07" * 32, 1), Sat(50_000)),))


def closing(received_sat: int) -> Channel:
    """A closing channel that has received `received_sat`."""
    return step(Payer("fees").channel(received_sat), Close(CloseReason.OPERATOR))


def drained(seed: str, funding_sat: int = 1_000_000) -> Channel:
    """A closing channel whose client has paid everything."""
    return Payer(seed, funding_sat=Sat(funding_sat)).channel(funding_sat)


def rate_after(seconds: int, estimate: int | None = None, floor: int = 1) -> int:
    return wanted_rate(CLOSING, rules, UnixTime(NOW + seconds), ChainFees(estimate, floor))


# --- the curve ------------------------------------------------------------------------------------------------------


def test_the_deadline_is_a_margin_before_the_refund() -> None:
    """The deadline is the expiry less the margin."""
    assert deadline(CLOSING, rules) == NOW + WINDOW


@looped(
    ("seconds", "rate"),
    [(-HOUR, 10), (0, 10), (WINDOW // 4, 13), (WINDOW // 2, 35), (WINDOW, 210), (WINDOW + 1, 210), (9 * WINDOW, 210)],
)
def test_the_rate_rises_with_the_cube_of_time(seconds: int, rate: int) -> None:
    """The rate has risen by an eighth at half the time, and is at the cap from the deadline on."""
    assert rate_after(seconds) == rate


@looped(("estimate", "floor", "rate"), [(None, 1, 10), (4, 1, 4), (4, 9, 9), (500, 1, 210), (None, 500, 210)])
def test_the_curve_begins_at_the_estimate(estimate: int | None, floor: int, rate: int) -> None:
    """Without an estimate it begins at the configured rate; never below the relay minimum, never above the cap."""
    assert rate_after(0, estimate, floor) == rate


@given(st.lists(st.integers(-HOUR, 2 * WINDOW), min_size=2, max_size=5), st.integers(1, 400), st.integers(1, 400))
def test_the_rate_never_falls_while_the_chain_stays_as_it_is(moments: list[int], estimate: int, floor: int) -> None:
    """A later call returns the same rate or a higher one, also in another process: only record and time count."""
    rates = [rate_after(moment, estimate, floor) for moment in sorted(moments)]

    assert rates == sorted(rates)
    assert all(1 <= rate <= rules.max_fee_sat_per_vb for rate in rates)


def test_threat_34_what_is_overdue_pays_the_cap_at_once() -> None:
    """A channel found closing after its deadline has no time for a curve."""
    late = msgspec.structs.replace(CLOSING, terms=msgspec.structs.replace(CLOSING.terms, expiry=Expiry(NOW + HOUR)))

    assert wanted_rate(late, rules, NOW, ChainFees(1)) == rules.max_fee_sat_per_vb
    assert is_urgent(late, rules, NOW)


def test_half_of_the_time_makes_it_urgent() -> None:
    """The exact second counts."""
    assert not is_urgent(CLOSING, rules, UnixTime(NOW + WINDOW // 2 - 1))
    assert is_urgent(CLOSING, rules, UnixTime(NOW + WINDOW // 2))


# --- replacing ------------------------------------------------------------------------------------------------------


@looped(
    ("paid", "rate", "outbid"),
    [(3_000, 12, False), (3_000, 13, True), (300, 1, False), (300, 2, True), (900, 3, False), (900, 4, True)],
)
def test_a_settlement_is_replaced_when_the_rate_rose_by_a_quarter(paid: int, rate: int, outbid: bool) -> None:
    """It also rose by at least a satoshi per byte, which a replacement must pay for its own relay (BIP125 rule 4)."""
    assert is_outbid(Settlement(bytes(300), b"", Sat(paid)), rate) is outbid


def test_threat_8_from_the_floor_to_the_cap_there_are_few_replacements() -> None:
    """The whole curve from 1 to 210 sat/vB in steps of a minute replaces fewer than 30 times, and ends at the cap."""
    paid, replaced = Settlement(bytes(348), b"", Sat(348)), 0
    for seconds in range(0, WINDOW + 60, 60):
        now, chain = UnixTime(NOW + seconds), ChainFees(1)
        if is_due(CLOSING, paid, rules, now, chain):
            rate = wanted_rate(CLOSING, rules, now, chain)
            paid, replaced = msgspec.structs.replace(paid, fee_sat=Sat(rate * 348)), replaced + 1

    assert paid.fee_sat == 210 * 348
    assert 3 < replaced < 30


# --- the budget -----------------------------------------------------------------------------------------------------


@looped(("received", "fee"), [(1_000_000 - 546, 348 * 210), (20_000, 10_000), (1_500, 750)])
def test_threat_8_fees_stay_within_a_share_of_what_was_received(received: int, fee: int) -> None:
    """The wanted rate is the cap: a large value pays the cap, a small value pays the share."""
    planned = plan_closing([closing(received)], SERVER_DESTINATION, rules, 210)

    size = settlement_size([closing(received).claim], SERVER_DESTINATION)
    assert planned == (size * 210 if received > 500_000 else fee)


def test_relaying_is_paid_even_beyond_the_share() -> None:
    """A tenth of 950 sat would not be relayed, so the settlement pays the relay floor."""
    channel = closing(950)
    size = settlement_size([channel.claim], SERVER_DESTINATION)
    thrifty = msgspec.structs.replace(rules, fee_share_percent=10)

    assert plan_closing([channel], SERVER_DESTINATION, thrifty, 50) == size
    assert budget_sat([channel.claim], size, thrifty) == size


@given(st.integers(0, 30_000), st.integers(1, 400), st.integers(1, 100))
def test_threat_24_a_settlement_pays_out_of_what_it_brings(received: int, rate: int, share: int) -> None:
    """The fee comes out of the received value and leaves no dust, or there is no settlement."""
    claim = Payer("fees").channel(received).claim
    fee = plan_fee([claim], SERVER_DESTINATION, rate, msgspec.structs.replace(rules, fee_share_percent=share))
    size = settlement_size([claim], SERVER_DESTINATION)
    if isinstance(fee, Shortfall):
        assert received < size + rules.dust_sat
    else:
        assert size <= fee <= max(size, min(rate * size, received * share // 100))
        assert received - fee >= rules.dust_sat


# --- the reserve and the child --------------------------------------------------------------------------------------


def test_the_reserve_helps_where_our_output_would_be_dust() -> None:
    """With a reserve coin all received value may become fee; without one, a part must stay as an output."""
    generous = msgspec.structs.replace(rules, fee_share_percent=100)
    claims = [closing(1_500).claim]
    starving = plan_fee(claims, SERVER_DESTINATION, 4, generous)

    assert starving == 1_500 - rules.dust_sat
    assert is_starved(claims, SERVER_DESTINATION, Sat(1_500 - rules.dust_sat), 4, generous)
    assert most_sat(claims, 348, generous, SERVER_DESTINATION) == 1_500 - rules.dust_sat
    size = settlement_size(claims, RESERVE.funding_script, reserve=RESERVE)
    assert plan_reserve_fee(claims, RESERVE, 3, generous) == 3 * size <= 1_500
    assert plan_reserve_fee(claims, RESERVE, 4, generous) is None


def test_threat_20_a_child_pays_what_both_lack() -> None:
    """Parent and child together pay the rate, within the budget and above dust; no unrelayable child is made."""
    parent = Settlement(bytes(348), b"", Sat(348))
    fee = plan_child_fee(parent, Sat(100_000), 20, rules)

    assert fee == 20 * (348 + CHILD_BYTES) - 348
    all_of_it = msgspec.structs.replace(rules, fee_share_percent=100)
    assert plan_child_fee(parent, Sat(fee + rules.dust_sat), 20, all_of_it) == fee
    assert plan_child_fee(parent, Sat(fee + rules.dust_sat - 1), 20, all_of_it) == fee - 1
    assert plan_child_fee(parent, Sat(CHILD_BYTES + rules.dust_sat - 1), 20, all_of_it) is None
    assert plan_child_fee(msgspec.structs.replace(parent, fee_sat=Sat(20_000)), Sat(100_000), 20, rules) is None
    assert plan_child_fee(parent, Sat(10_000), 20, rules) == (10_000 + parent.fee_sat) // 2 - parent.fee_sat


def test_fault_05_several_pay_no_more_together_than_each_could_alone() -> None:
    """At 40 sat/vB a channel that received 2,000 sat stays out; at any rate the poorest member limits the fee."""
    thrifty = msgspec.structs.replace(rules, fee_share_percent=50, max_fee_sat_per_vb=200)
    channels = [drained("rich"), drained("richer"), drained("poor", 2_000)]
    assert able_to_pay(channels, SERVER_DESTINATION, thrifty, 40) == channels[:2]
    assert able_to_pay(channels, SERVER_DESTINATION, thrifty, 2) == channels
    for rate in (1, 2, 3, 40, 200):
        for members in (channels, channels[:2]):
            fee = plan_closing(members, SERVER_DESTINATION, thrifty, rate)
            assert not isinstance(fee, Shortfall)
            size = settlement_size([member.claim for member in members], SERVER_DESTINATION)
            for member in members:
                alone = settlement_size([member.claim], SERVER_DESTINATION)
                most = most_sat([member.claim], alone, thrifty, SERVER_DESTINATION)
                assert most * size >= fee * alone - size


@looped(
    ("seconds", "floor", "estimate", "received", "fee"),
    [
        (WINDOW - 1, 150, None, 100_000, 50_000),  # before the deadline the share is the limit
        (WINDOW, 150, None, 100_000, "150"),  # past it the settlement pays the relay minimum
        (WINDOW, 1, 170, 100_000, "170"),  # or the estimate
        (WINDOW, 1, None, 100_000, 50_000),  # but not more than needed
        (WINDOW, 400, None, 100_000, "210"),  # within the cap of the rate
        (WINDOW, 150, None, 40_000, 40_000 - 546),  # any fee that leaves more than dust
    ],
)
def test_fault_09_past_the_deadline_the_share_gives_way(
    seconds: int, floor: int, estimate: int | None, received: int, fee: int | str
) -> None:
    """Until the deadline the share limits the fee; after it the server or the reserve pays the needed rate."""
    channel = msgspec.structs.replace(closing(received), terms=CLOSING.terms)
    now_rules = pressed(rules, [channel], UnixTime(NOW + seconds), ChainFees(estimate, floor))
    size = settlement_size([channel.claim], SERVER_DESTINATION)
    wanted = int(fee) * size if isinstance(fee, str) else fee
    assert plan_closing([channel], SERVER_DESTINATION, now_rules, 210) == wanted
    assert most_sat([channel.claim], size, now_rules, SERVER_DESTINATION) == wanted
    assert is_beyond_share([channel.claim], Sat(wanted), now_rules) == (seconds == WINDOW and wanted > received // 2)
    with_coin = settlement_size([channel.claim], RESERVE.funding_script, reserve=RESERVE)
    funded = plan_reserve_fee([channel.claim], RESERVE, 150, now_rules)
    enough = now_rules.needed_sat_per_vb >= 150 and 150 * with_coin <= received
    assert funded == (150 * with_coin if enough else None if seconds < WINDOW or floor >= 150 else received // 2)


@looped(
    ("share", "received", "most"),
    [
        (50, 100_000, "cap"),
        (50, 20_000, 20_000),
        (10, 90_000, 10_000),
        (100, 600, "cap"),
        (50, 545, 769),
        (50, 0, 1_314),
    ],
)
def test_fault_21_what_a_closing_client_offers_is_paid_or_refused(share: int, received: int, most: int | str) -> None:
    """An offer within share and cap becomes fee to the last satoshi; one satoshi more is refused with both numbers."""
    payer, now_rules = Payer("offers"), msgspec.structs.replace(rules, fee_share_percent=share)
    channel, view = payer.channel(received), View(NOW, now_rules)
    allowed = most_offered_sat(channel.claim, Sat(received), now_rules)
    assert most in (allowed, "cap")
    assert most != "cap" or allowed == (settlement_size([channel.claim], bytes(22)) * 210)
    length = 2 * 210  # a difference of two bytes in the payment's signature, at the cap
    for offer in (allowed - length if most == "cap" else allowed, allowed + length + 1):
        payment = payer.payment(channel.payment.change_sat - offer)
        outcome = apply(channel, CloseByPayment(payment), view)
        if offer > allowed:
            assert isinstance(outcome, Rejected)
            assert outcome.error.code == ClosingFeeTooHigh.code
            assert f"got {offer} sat" in str(outcome.error)
        elif offer:
            assert isinstance(outcome, Accepted)
            for rate in (1, 10, 210):
                fee = plan_closing([outcome.channel], SERVER_DESTINATION, now_rules, rate)
                assert not isinstance(fee, Shortfall)
                assert fee >= offer
                always = settlement_size([outcome.channel.claim], SERVER_DESTINATION, server_output=False) + 1_000
                assert fee * 100 <= outcome.channel.received_sat * share or fee <= always
