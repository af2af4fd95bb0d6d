"""Limits of server and signer, side by side."""

from __future__ import annotations

import msgspec

from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.signer_messages import HealthReply
from paychan.signer_client.limits import contradictions
from tests.lib.channels import RULES
from tests.lib.looped import looped


@looped(("batch_channels", "fits"), [(0, True), (20, True), (91, True), (92, False), (200, False)])
def test_fault_05_a_batch_must_be_able_to_pay_the_highest_rate(batch_channels: int, fits: bool) -> None:
    """200 channels of 272 bytes at 200 sat/vB cost 10,880,000 sat, the signer allows 5,000,000: the text names both."""
    health = HealthReply(1, "regtest", "hardened", False, "", UnixTime(0), 50, Sat(5_000_000), 200)
    rules = msgspec.structs.replace(RULES, max_fee_sat_per_vb=200, fee_share_percent=50)
    said = contradictions(health, rules, batch_channels)
    assert len(said) == (0 if fits else 1)
    for text in said:
        assert f"settlement.batch_channels of the server is {batch_channels}" in text
        assert f"{batch_channels * 272 * 200} sat" in text
        assert "policy.max_fee_sat is 5000000 sat" in text
