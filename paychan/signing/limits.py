"""Limits of server and signer that contradict each other: settlements would be refused when fees are high, at the deadline."""

from __future__ import annotations

from paychan.protocol.channel import Rules
from paychan.protocol.signerwire import HealthReply


def contradictions(health: HealthReply, rules: Rules) -> list[str]:
    """Say, one sentence each, what the server may pay and the signer refuses. A limit that is 0 was not told."""
    pairs = (
        ("max_fee_sat_per_vb", rules.max_fee_sat_per_vb, health.max_fee_sat_per_vb, "sat/vB"),
        ("max_fee_percent", rules.fee_share_percent, health.max_fee_percent, "%"),
    )
    return [
        f"settlement.{name} of the server is {server} {unit}, but the signer's policy.{name} is {signer} {unit}: "
        "raise the signer's, or lower the server's"
        for name, server, signer, unit in pairs
        if server > signer and health.max_fee_sat_per_vb
    ]
