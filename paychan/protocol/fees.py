"""Fees of settlements: the deadline, the fee rate that rises towards it, and the budget that limits the fee.

Everything here is a pure function of the record, the operator's rules, the time and two figures of the chain (an
estimate, and the lowest rate that is relayed), so a restart or a rebuild computes the same fee. Rates are whole satoshi
per virtual byte.

    rate
    max ┤                                ╭      start   the chain's estimate, or `rules.fee_sat_per_vb`
        │                               ╭╯      max     `rules.max_fee_sat_per_vb`
        │                            ╭──╯       between start + (max - start) · (elapsed / window)³:
    start ─────────────────────────╯            an eighth of the way at half the time, all of it at the deadline
        └┬──────────────────────────────┬─
     closing begins                  deadline = expiry - margin
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from paychan.protocol.channel import Channel, CloseReason, Rules, View
from paychan.protocol.errors import FeesTooHigh, PaychanError
from paychan.protocol.moment import LEAD_SECONDS
from paychan.protocol.settlement import (
    CHILD_BYTES,
    LEAST_FEE_CAP_SAT,
    Claim,
    Reserve,
    Settlement,
    received_sat,
    settlement_size,
)
from paychan.protocol.types import Sat, UnixTime

RELAY_FLOOR_SAT_PER_VB = 1
"""Default of Bitcoin Core's -minrelaytxfee for many years; some nodes do not relay a settlement that pays less."""

_STEP_PERCENT = 25
"""A settlement is replaced when the curve has risen by this: few replacements, each with a real effect."""


_LARGEST_DESTINATION = bytes(34)
"""Upper bound for any destination: P2WSH and P2TR outputs have the longest standard scriptPubKey."""

_SMALLEST_DESTINATION = bytes(22)
"""Lower bound for any destination: P2WPKH outputs have the shortest standard scriptPubKey."""


class ChainFees(Struct, frozen=True):
    """The chain's fee rates: an estimate for confirmation within hours, if there is one, and the relay minimum now.

    `increment_sat_per_vb` is the rate that a replacement must add for its own relay (BIP125 rule 4).
    """

    estimate_sat_per_vb: int | None = None
    floor_sat_per_vb: int = RELAY_FLOOR_SAT_PER_VB
    increment_sat_per_vb: int = 1


class Shortfall(Struct, frozen=True):
    """The reason why claims can't be settled: they received less than the cheapest relayed settlement costs."""

    received_sat: Sat
    needed_sat: Sat


# --- time -----------------------------------------------------------------------------------------------------------


def deadline(channel: Channel, rules: Rules) -> UnixTime:
    """Time by which the settlement should be confirmed: a margin before the refund becomes valid (median time past)."""
    return UnixTime(channel.terms.expiry.unix_time - rules.deadline_margin_seconds)


def wanted_rate(channel: Channel, rules: Rules, now: UnixTime, chain: ChainFees) -> int:
    """Rate that a closing channel's settlement should pay now: the curve above, at most the operator's cap."""
    begun, cap = _begun(channel, rules, now), rules.max_fee_sat_per_vb
    start = min(max(chain.estimate_sat_per_vb or rules.fee_sat_per_vb, chain.floor_sat_per_vb), cap)
    window = deadline(channel, rules) - begun
    elapsed = min(max(now - begun, 0), window)
    return cap if window <= 0 else start + (cap - start) * elapsed**3 // window**3


def is_urgent(channel: Channel, rules: Rules, now: UnixTime) -> bool:
    """Say whether half of the time to the deadline has passed: a settlement no longer waits for other channels."""
    begun = _begun(channel, rules, now)
    return 2 * (now - begun) >= deadline(channel, rules) - begun


def _begun(channel: Channel, rules: Rules, now: UnixTime) -> UnixTime:
    """Start time of the curve.

    A start far in the future came from a wrong clock; then the curve starts when closing for expiry starts.
    """
    if channel.closing is None:
        return now
    if channel.closing.begun_at <= now + LEAD_SECONDS:
        return channel.closing.begun_at
    return min(now, UnixTime(channel.terms.expiry.unix_time - rules.settlement_period_seconds))


def is_outbid(paid: Settlement, rate_sat_per_vb: int) -> bool:
    """Say whether this rate is enough above the settlement's own rate to replace the settlement."""
    least = paid.fee_sat * (100 + _STEP_PERCENT)
    return rate_sat_per_vb * paid.size * 100 >= max(least, (paid.fee_sat + paid.size) * 100)


def is_below_floor(paid: Settlement, chain: ChainFees) -> bool:
    """Say whether a settlement pays less than the rate that the chain relays now."""
    return paid.fee_sat < paid.size * chain.floor_sat_per_vb


def is_due(channel: Channel, paid: Settlement, rules: Rules, now: UnixTime, chain: ChainFees) -> bool:
    """Say whether to replace a settlement now.

    The reasons: the curve is a step above its rate, the curve has reached the cap, or the chain relays it no longer.
    """
    rate, cap = wanted_rate(channel, rules, now, chain), rules.max_fee_sat_per_vb
    last_step = rate == cap and (cap - 1) * paid.size > paid.fee_sat
    return is_outbid(paid, rate) or last_step or is_below_floor(paid, chain)


# --- money ----------------------------------------------------------------------------------------------------------


def pressed(rules: Rules, channels: Sequence[Channel], now: UnixTime, chain: ChainFees) -> Rules:
    """Return the rules for settling these channels now: past the deadline, the needed rate may exceed the share.

    Before the deadline a settlement that would cost more than the share waits for lower fees. After the deadline the
    client's refund wins if no settlement confirms, so any amount above dust is better than nothing. The settlement then
    pays the chain's estimate, or at least the relay minimum, still within the cap of the rate.
    """
    if any(now < deadline(channel, rules) for channel in channels):
        return rules
    needed = max(chain.floor_sat_per_vb, chain.estimate_sat_per_vb or 0)
    return msgspec.structs.replace(rules, needed_sat_per_vb=min(needed, rules.max_fee_sat_per_vb))


def budget_sat(claims: Sequence[Claim], size: int, rules: Rules) -> Sat:
    """Largest fee of settling these claims: a share of the received value, but at least the relayed or needed fee."""
    share_sat = received_sat(claims) * rules.fee_share_percent // 100
    return Sat(max(share_sat, size * max(RELAY_FLOOR_SAT_PER_VB, rules.needed_sat_per_vb)))


def is_beyond_share(claims: Sequence[Claim], fee: Sat, rules: Rules) -> bool:
    """Say whether a fee is above the operator's share; only the rate that is needed past the deadline may exceed it."""
    return bool(rules.needed_sat_per_vb) and fee > received_sat(claims) * rules.fee_share_percent // 100


def plan_fee(
    claims: Sequence[Claim],
    destination_script: bytes,
    rate_sat_per_vb: int,
    rules: Rules,
    *,
    client_fee_sat: Sat = Sat(0),
    may_give_all: bool = False,
) -> Sat | Shortfall:
    """Choose the fee of a settlement in satoshi (RBPCP §8.1, without its zero and dust outputs).

    The fee is the rate times the size, or the client's offer if that is higher and within the cap of the rate. The
    budget limits the fee, but not the client's offer. If the fee would leave the server less than dust, it is lowered,
    down to the relay floor.
    `may_give_all`: the client asked for the settlement. If the client's offer would leave the server less than dust, or
    the received value is too small for a server output, all received value becomes fee, provided the client has change.
    """
    received = received_sat(claims)
    size = settlement_size(claims, destination_script)
    wanted = size * max(rate_sat_per_vb, RELAY_FLOOR_SAT_PER_VB)
    need = size * RELAY_FLOOR_SAT_PER_VB + rules.dust_sat
    if received >= need:
        offered = min(client_fee_sat, size * rules.max_fee_sat_per_vb)
        if offered > received - rules.dust_sat and may_give_all and claims[0].payment.has_change:
            return received
        budget = max(budget_sat(claims, size, rules), offered)
        return Sat(min(max(wanted, offered), budget, received - rules.dust_sat))
    if may_give_all and claims[0].payment.has_change:
        need = settlement_size(claims, destination_script, server_output=False) * RELAY_FLOOR_SAT_PER_VB
        if received >= need:
            return received
    return Shortfall(received, Sat(need))


def most_offered_sat(claim: Claim, received_before_sat: Sat, rules: Rules) -> Sat:
    """Largest fee, in satoshi, that a closing client may offer so that all of the offer can become fee.

    The offer is received value too, and counts in the share, because the signer sees one sum. The signer's cap of the
    rate applies as well. The client of a channel that has received very little must be able to close too: the signer
    always allows `LEAST_FEE_CAP_SAT` above one satoshi per byte. If the received value is too small for a server
    output, all of it becomes fee.
    """
    share, has_output = rules.fee_share_percent, received_before_sat >= rules.dust_sat
    if not has_output and not claim.payment.change_sat:
        return Sat(0)  # a settlement needs an output
    size = settlement_size([claim], _SMALLEST_DESTINATION, server_output=has_output)
    least = size + LEAST_FEE_CAP_SAT - (0 if has_output else received_before_sat)
    shared = received_before_sat * share // (100 - share) if share < 100 else size * rules.max_fee_sat_per_vb
    return Sat(max(0, min(size * rules.max_fee_sat_per_vb, max(shared if has_output else 0, least))))


def plan_closing(
    channels: Sequence[Channel], destination_script: bytes, rules: Rules, rate_sat_per_vb: int | None = None
) -> Sat | Shortfall:
    """Fee of settling closing channels; all received value may become fee only if each client asked to close."""
    closings = [channel.closing for channel in channels if channel.closing]
    claims = [channel.claim for channel in channels]
    plan = plan_fee(
        claims,
        destination_script,
        rules.fee_sat_per_vb if rate_sat_per_vb is None else rate_sat_per_vb,
        rules,
        client_fee_sat=Sat(sum(closing.client_fee_sat for closing in closings)),
        may_give_all=all(closing.reason is CloseReason.CLIENT for closing in closings),
    )
    if isinstance(plan, Shortfall) or len(claims) == 1:
        return plan
    size = settlement_size(claims, destination_script)
    most = max(most_sat(claims, size, rules, destination_script), size * RELAY_FLOOR_SAT_PER_VB)
    return Sat(min(plan, most))


def least_fee(channel: Channel, rules: Rules) -> Sat | Shortfall:
    """Fee of a channel's settlement at the lowest rate of the curve, or the shortfall if it can't be settled."""
    return plan_closing([channel], _LARGEST_DESTINATION, rules)


def floor_problem(channel: Channel, view: View) -> PaychanError | None:
    """Say why a channel that leaves OPEN now would be stuck: its largest fee is below the relay minimum.

    A channel that expires, or whose client has paid everything, must close anyway. Any other can wait for lower fees,
    or its client can offer more. Past the deadline no channel waits.
    """
    reason = channel.closing.reason if channel.closing else CloseReason.EXPIRY
    if reason in (CloseReason.EXPIRY, CloseReason.DRAINED) or view.paying_time >= deadline(channel, view.rules):
        return None
    size = settlement_size([channel.claim], _SMALLEST_DESTINATION)
    most = most_sat([channel.claim], size, view.rules, _SMALLEST_DESTINATION)
    need = Sat(size * view.floor_sat_per_vb)
    return FeesTooHigh(got_sat=max(most, Sat(0)), need_sat=need) if most < need and view.floor_sat_per_vb > 1 else None


def most_sat(claims: Sequence[Claim], size: int, rules: Rules, destination_script: bytes) -> Sat:
    """Largest fee that the server's own output can pay: within the budget and the cap of the rate, leaving no dust.

    Channels that are settled together pay no higher rate than each could pay alone. If one of them is double-spent, the
    shared settlement is void, and each other channel must be settled alone at a rate no lower than the one signed
    before.
    """
    budget = budget_sat(claims, size, rules)
    most = min(budget, size * rules.max_fee_sat_per_vb, received_sat(claims) - rules.dust_sat)
    for claim in claims if len(claims) > 1 else ():
        alone = settlement_size([claim], destination_script)
        most = min(most, most_sat([claim], alone, rules, destination_script) * size // alone)
    return Sat(most)


def able_to_pay(
    channels: Sequence[Channel], destination_script: bytes, rules: Rules, rate_sat_per_vb: int
) -> list[Channel]:
    """Choose the channels that could each pay the common rate alone, out of those that could be settled together.

    The others would have to pay for the bytes of a channel that can't, and it could never be settled alone at that
    rate.
    """
    members = list(channels)
    while len(members) > 1:
        claims = [member.claim for member in members]
        size = settlement_size(claims, destination_script)
        wanted = min(size * rate_sat_per_vb, budget_sat(claims, size, rules))
        fitting = [
            member for member in members if _can_pay_alone(member.claim, destination_script, rules, wanted, size)
        ]
        if len(fitting) == len(members):
            break
        members = fitting
    return members


def _can_pay_alone(claim: Claim, destination_script: bytes, rules: Rules, fee: int, size: int) -> bool:
    alone = settlement_size([claim], destination_script)
    return most_sat([claim], alone, rules, destination_script) * size >= fee * alone


def is_starved(
    claims: Sequence[Claim], destination_script: bytes, fee: Sat, rate_sat_per_vb: int, rules: Rules
) -> bool:
    """Say whether a settlement pays less than it should, because a higher fee would leave an output of dust."""
    size = settlement_size(claims, destination_script)
    return fee < min(size * rate_sat_per_vb, budget_sat(claims, size, rules))


def plan_reserve_fee(claims: Sequence[Claim], reserve: Reserve, rate_sat_per_vb: int, rules: Rules) -> Sat | None:
    """Fee of a settlement that the reserve's coins help to pay; None if it exceeds the budget or leaves dust.

    The rest of claims and coins goes back to the reserve's key in one output, so no server output can be too small.
    Past the deadline the fee falls to the needed rate if the budget allows no more. The fee never exceeds the received
    value.
    """
    size = settlement_size(claims, reserve.funding_script, reserve=reserve)
    most = min(budget_sat(claims, size, rules), received_sat(claims))
    fee = Sat(size * rate_sat_per_vb)
    if fee > most and rules.needed_sat_per_vb:
        fee = Sat(max(size * min(rate_sat_per_vb, rules.needed_sat_per_vb), most))
    left = received_sat(claims) + reserve.value_sat - fee
    return fee if fee <= most and left >= rules.dust_sat else None


def plan_child_fee(parent: Settlement, own_sat: Sat, rate_sat_per_vb: int, rules: Rules) -> Sat | None:
    """Fee of a child that raises parent and child together to a rate (CPFP), or as far as the budget of both allows.

    `own_sat` is the value of the parent's output that the child spends. That output and the parent's fee are the
    received value of which the budget is a share. None if the parent pays enough already, or if the output can't raise
    its rate.
    """
    wanted = rate_sat_per_vb * (parent.size + CHILD_BYTES) - parent.fee_sat
    least = CHILD_BYTES * RELAY_FLOOR_SAT_PER_VB
    both = parent.size + CHILD_BYTES
    share = (own_sat + parent.fee_sat) * rules.fee_share_percent // 100
    most = max(share, both * rules.needed_sat_per_vb) - parent.fee_sat
    fee = min(max(wanted, least), most, own_sat - rules.dust_sat)
    lifts = fee * parent.size > parent.fee_sat * CHILD_BYTES
    return Sat(fee) if wanted > 0 and fee >= least and lifts else None
