"""Limits of server and signer that contradict each other: settlements would be refused when fees are high, at the deadline."""

from __future__ import annotations

from paychan.protocol.channel import Rules
from paychan.protocol.wire.signer_messages import HealthReply

_CLAIM_BYTES = 272
"""Most that a channel adds to a settlement of several, signed."""


def contradictions(health: HealthReply, rules: Rules, batch_channels: int = 0) -> list[str]:
    """Say, one sentence each, what the server may pay and the signer refuses. A limit of 0 is unknown.

    `batch_channels`: so many are settled together; 0: none are. A full batch must be able to pay the highest rate, or it
    stays below the curve when it matters.
    """
    batch_sat = batch_channels * _CLAIM_BYTES * rules.max_fee_sat_per_vb
    pairs = (
        ("max_fee_sat_per_vb", rules.max_fee_sat_per_vb, health.max_fee_sat_per_vb, "sat/vB"),
        ("max_fee_percent", rules.fee_share_percent, health.max_fee_percent, "%"),
    )
    batch = (
        f"settlement.batch_channels of the server is {batch_channels}, which is {batch_sat} sat at {rules.max_fee_sat_per_vb} "
        f"sat/vB, but the signer's policy.max_fee_sat is {health.max_fee_sat} sat: raise the signer's, or lower the server's"
    )
    return [
        f"settlement.{name} of the server is {server} {unit}, but the signer's policy.{name} is {signer} {unit}: "
        "raise the signer's, or lower the server's"
        for name, server, signer, unit in pairs
        if server > signer and health.max_fee_sat_per_vb
    ] + ([batch] if 0 < health.max_fee_sat < batch_sat else [])
