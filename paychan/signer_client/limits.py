"""Contradictions between limits of server and signer: with one, the signer would refuse high fees near the deadline."""

from __future__ import annotations

from paychan.protocol.channel import Rules
from paychan.protocol.wire.signer_messages import HealthReply

_CLAIM_BYTES = 272
"""Most bytes that one channel adds to a signed settlement of several channels."""


def contradictions(health: HealthReply, rules: Rules, batch_channels: int = 0) -> list[str]:
    """Return one sentence for each fee that the server may pay and the signer refuses. A limit of 0 is unknown.

    `batch_channels`: most channels in one settlement; 0: no batches. A full batch must be able to pay the highest fee
    rate, or its fee stays too low near the deadline.
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
