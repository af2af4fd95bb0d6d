"""Trust in the wall clock, and the time on the fee curve."""

from __future__ import annotations

import pytest

from paychan.protocol.channel import Close, CloseReason
from paychan.protocol.fees import ChainFees, is_urgent, wanted_rate
from paychan.protocol.moment import LEAD_SECONDS, STEP_SECONDS, Reading, is_believed, paying_time
from paychan.protocol.state_machine import apply
from paychan.protocol.types import UnixTime
from tests.lib.channels import DAY_SECONDS, NOW, RULES, View, accepted
from tests.lib.channels import Payer as PayerOfChannel
from tests.lib.looped import looped

HOUR = 3600
AGREED = Reading(NOW, 100.0)


@pytest.mark.parametrize(
    ("wall", "steady", "block", "agreed", "believed"),
    [
        pytest.param(NOW + LEAD_SECONDS, 0.0, NOW, None, True, id="a late block"),
        pytest.param(NOW + LEAD_SECONDS + 1, 0.0, NOW, None, False, id="ahead at start"),
        pytest.param(NOW - 900 * DAY_SECONDS, 0.0, NOW, None, True, id="behind"),
        pytest.param(NOW + 9 * HOUR, 100.0 + 9 * HOUR, NOW, AGREED, True, id="nine hours without a block"),
        pytest.param(NOW + 9 * HOUR + STEP_SECONDS, 100.0 + 9 * HOUR, NOW, AGREED, True, id="corrected meanwhile"),
        pytest.param(NOW + 9 * HOUR + STEP_SECONDS + 1, 100.0 + 9 * HOUR, NOW, AGREED, False, id="stepped meanwhile"),
        pytest.param(NOW + 7 * DAY_SECONDS, 102.0, NOW, AGREED, False, id="a week ahead at once"),
        pytest.param(NOW + 9 * HOUR, 101.0, NOW, AGREED, False, id="suspended for nine hours, no block yet"),
        pytest.param(NOW + 9 * HOUR, 101.0, NOW + 9 * HOUR, AGREED, True, id="suspended for nine hours, then a block"),
        pytest.param(NOW + 5 * HOUR, 101.0, NOW + 5 * HOUR, AGREED, True, id="stepped forward to the right time"),
    ],
)
def test_fault_06_a_clock_is_believed_while_a_witness_agrees(
    wall: int, steady: float, block: int, agreed: Reading | None, believed: bool
) -> None:
    """A recent block, or the steady clock since the last such block, must agree with the wall clock."""
    assert is_believed(Reading(UnixTime(wall), steady), UnixTime(block), agreed) is believed


def test_fault_06_fees_rise_by_the_chains_time() -> None:
    """They follow the wall clock up to two hours past the median time, and the median time if it is later."""
    assert paying_time(NOW, None) == NOW
    assert paying_time(NOW, UnixTime(NOW - HOUR)) == NOW
    assert paying_time(UnixTime(NOW + 7 * DAY_SECONDS), NOW) == NOW + LEAD_SECONDS


@looped("reason", [CloseReason.EXPIRY, CloseReason.OPERATOR])
def test_fault_06_a_closing_under_a_wrong_clock_starts_at_the_first_rate(reason: CloseReason) -> None:
    """A channel that is closed while the clock is weeks ahead pays the first rate, not the cap."""
    channel = PayerOfChannel("closed under a wrong clock").channel()
    wrong = View(UnixTime(channel.terms.expiry.lock_time), RULES, "", NOW)
    closing = accepted(apply(channel, Close(reason), wrong))

    assert closing.closing is not None
    assert closing.closing.begun_at == NOW + LEAD_SECONDS
    assert wanted_rate(closing, RULES, wrong.paying_time, ChainFees()) == RULES.fee_sat_per_vb
    assert not is_urgent(closing, RULES, wrong.paying_time)


def test_fault_06_a_closing_time_in_the_future_raises_no_fee() -> None:
    """A record whose closing began by a clock weeks ahead follows the curve of a channel that closes for expiry."""
    channel = PayerOfChannel("stored under a wrong clock").channel()
    ahead = accepted(
        apply(channel, Close(CloseReason.EXPIRY), View(UnixTime(channel.terms.expiry.lock_time + 1), RULES))
    )
    begin = UnixTime(channel.terms.expiry.lock_time - RULES.settlement_period_seconds)

    for now in (NOW, begin):
        assert wanted_rate(ahead, RULES, now, ChainFees()) == RULES.fee_sat_per_vb
        assert not is_urgent(ahead, RULES, now)
    half = UnixTime(begin + RULES.settlement_period_seconds // 2)
    assert RULES.fee_sat_per_vb < wanted_rate(ahead, RULES, half, ChainFees()) < RULES.max_fee_sat_per_vb
    assert wanted_rate(ahead, RULES, UnixTime(channel.terms.expiry.lock_time), ChainFees()) == RULES.max_fee_sat_per_vb
