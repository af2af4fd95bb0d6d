"""The settlement planner: what to do next so that closing channels are settled, as one pure function.

`plan` reads the records, what spends their outputs, and the conditions (rules, time, fees of the chain). It answers
with attempts in the order in which they are made; the first that succeeds counts:

1. `Sign` a settlement, at the rate of the curve in `fees`. Once the curve has risen enough, or another transaction has
   taken the settlement's place in the mempool, sign one that pays more from the server's own output.
2. `FundFromReserve` if the server's own output is too small to pay that rate.
3. `ChildPays` (CPFP) if the settlement can't be replaced: the node does not replace it, payments depend on its txid, or
   a replacement would have to pay for transactions that others attached to it (pinning), beyond the budget.
4. `Pinned` if nothing can raise the fee: the operator must know.

The server's settling role and `paychan settle --offline` carry the attempts out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
from msgspec import Struct

from paychan.protocol.channel import Channel, Rules
from paychan.protocol.fees import (
    ChainFees,
    Shortfall,
    able_to_pay,
    is_below_floor,
    is_due,
    is_outbid,
    is_starved,
    is_urgent,
    most_sat,
    plan_child_fee,
    plan_closing,
    plan_reserve_fee,
    pressed,
    wanted_rate,
)
from paychan.protocol.settlement import (
    CHILD_BYTES,
    Claim,
    Coin,
    Reserve,
    Settlement,
    outpoints_of,
    received_sat,
    settlement_size,
)
from paychan.protocol.types import OutPoint, Sat, UnixTime


class Conditions(Struct, frozen=True):
    """The operator's rules, the time on the fee curve, the chain's fees, and the rate that the operator requests."""

    rules: Rules
    now: UnixTime
    fees: ChainFees = ChainFees()
    requested_sat_per_vb: int | None = None
    """Rate of `--fee-rate`, instead of the curve's; it also raises the cap, and counts as needed past the deadline."""
    follows_curve: bool = True
    """Whether a signed settlement is replaced when the curve has risen; `settle --offline` follows only requests."""

    def rate(self, members: Sequence[Channel]) -> int:
        """Rate for these channels together, in satoshi per virtual byte: the highest that one of them needs."""
        if self.requested_sat_per_vb:
            return self.requested_sat_per_vb
        return max(wanted_rate(member, self.rules, self.now, self.fees) for member in members)

    def rules_for(self, members: Sequence[Channel]) -> Rules:
        """Rules for settling these channels now, see `fees.pressed`."""
        if not self.requested_sat_per_vb:
            return pressed(self.rules, members, self.now, self.fees)
        cap = max(self.rules.max_fee_sat_per_vb, self.requested_sat_per_vb)
        rules = msgspec.structs.replace(self.rules, max_fee_sat_per_vb=cap)
        fees = msgspec.structs.replace(self.fees, estimate_sat_per_vb=self.requested_sat_per_vb)
        return pressed(rules, members, self.now, fees)

    def is_due(self, member: Channel, paid: Settlement) -> bool:
        """Say whether a settlement pays less than it should now: less than was requested, or see `fees.is_due`."""
        if self.requested_sat_per_vb:
            return self.requested_sat_per_vb * paid.size > paid.fee_sat
        if not self.follows_curve:
            return is_below_floor(paid, self.fees)
        return is_due(member, paid, self.rules, self.now, self.fees)


class Unconfirmed(Struct, frozen=True):
    """A transaction in the mempool that spends a member's output: a new settlement evicts it.

    `fee_sat` counts the transactions that depend on it, too; 0: unknown. `size` is its own, without witness.
    """

    txid: bytes
    fee_sat: Sat = Sat(0)
    size: int = 1


class Spends(Struct, frozen=True):
    """The settlement that was signed last, and the transactions in the mempool that spend the members' outputs."""

    paid: Settlement | None = None
    mempool: tuple[Unconfirmed, ...] = ()
    child: Settlement | None = None
    """A child of `paid` that was broadcast."""
    is_replaceable: bool = True
    """Whether the node would replace `paid` in its mempool."""
    is_void: bool = False
    """Whether `paid` can't confirm any more, because one of its inputs is spent; the next one may pay a lower rate."""
    is_built_upon: bool = False
    """Whether payments depend on the txid of `paid`, a withdrawal: it is never replaced."""

    @property
    def is_published(self) -> bool:
        """Whether the mempool has the last settlement."""
        return self.paid is not None and any(each.txid == self.paid.txid for each in self.mempool)

    @property
    def is_displaced(self) -> bool:
        """Whether the mempool has another transaction in its place: an earlier settlement, or a refund."""
        return self.paid is not None and any(each.txid != self.paid.txid for each in self.mempool)


class Sign(Struct, frozen=True):
    """Have a settlement signed for this fee. If the signer allows only a lower one: for that, if it is not below `least`."""

    fee_sat: Sat
    least_sat: Sat = Sat(0)


class FundFromReserve(Struct, frozen=True):
    """Have a settlement signed to which a coin of the reserve is added, see `choose_coin`; fails without such a coin."""

    rate_sat_per_vb: int
    least_sat: Sat = Sat(0)


class ChildPays(Struct, frozen=True):
    """Broadcast the last settlement with a child of the server's output that pays this fee."""

    fee_sat: Sat


class SuccessorPays(Struct, frozen=True):
    """Broadcast the withdrawal with the settlement of the channel that continues at its change output."""


class Wait(Struct, frozen=True):
    """The last settlement stays as it is."""


class Pinned(Struct, frozen=True):
    """The fee can't be raised, for this reason."""

    reason: str


Attempt: TypeAlias = Sign | FundFromReserve | ChildPays | SuccessorPays | Wait | Pinned | Shortfall
"""`Shortfall`: the channels received less than the cheapest settlement costs."""


def plan(
    members: Sequence[Channel], destination_script: bytes, spends: Spends, conditions: Conditions
) -> tuple[Attempt, ...]:
    """Decide what to do next for channels that are settled by one transaction, in the order of its inputs."""
    paid = spends.paid
    if paid is None:
        size = settlement_size([member.claim for member in members], destination_script)
        return plan_signing(members, destination_script, conditions, replacement_fee(size, spends, conditions.fees))
    due = any(conditions.is_due(member, paid) for member in members)
    if spends.is_built_upon:
        if not due:
            return (Wait(),)
        continued = OutPoint(paid.txid, 0)
        why = f"payments depend on it; closing the channel at {continued}, to which it moved, adds a fee"
        return (*plan_child(members, paid, spends.child, conditions), SuccessorPays(), _no_child(why))
    if spends.is_void:
        return _replace(members, destination_script, paid, spends, conditions)
    if not due and not spends.is_displaced:
        return (Wait(),)
    if spends.is_published and not spends.is_displaced and not spends.is_replaceable:
        why = "it does not signal replaceability, so the node does not replace it"
        return (*plan_child(members, paid, spends.child, conditions), _no_child(why))
    return _replace(members, destination_script, paid, spends, conditions)


def plan_signing(
    members: Sequence[Channel], destination_script: bytes, conditions: Conditions, least_sat: Sat = Sat(0)
) -> tuple[Attempt, ...]:
    """Plan a settlement at the rate of the members, but with a fee of at least `least_sat`, within their budget."""
    claims, rate, rules = [member.claim for member in members], conditions.rate(members), conditions.rules_for(members)
    fee = plan_closing(members, destination_script, rules, rate)
    if isinstance(fee, Shortfall):
        return (fee,)
    size = settlement_size(claims, destination_script)
    least_sat = min(least_sat, max(fee, most_sat(claims, size, rules, destination_script)))
    sign = Sign(max(fee, least_sat), least_sat)
    if is_starved(claims, destination_script, sign.fee_sat, rate, rules):
        return FundFromReserve(rate, least_sat), sign
    return (sign,)


def _replace(
    members: Sequence[Channel], destination_script: bytes, paid: Settlement, spends: Spends, conditions: Conditions
) -> tuple[Attempt, ...]:
    """Plan a settlement in the place of the last one, and of whatever else spends the members' outputs."""
    rate, rules, claims = conditions.rate(members), conditions.rules_for(members), [member.claim for member in members]
    whole = len(members) == len(outpoints_of(paid.transaction))
    size = paid.size if whole else settlement_size(claims, destination_script)
    most = most_sat(claims, size, rules, destination_script)
    least = replacement_fee(size, spends, conditions.fees)
    wanted, in_place = Sat(min(rate * size, most)), spends.is_published and not spends.is_displaced
    child = plan_child(members, paid, spends.child, conditions) if wanted < least and whole and in_place else ()
    if least > most:
        if in_place and least <= paid.fee_sat + size * conditions.fees.increment_sat_per_vb:
            return (*child, Wait())  # nothing is attached to it, and it pays its whole budget
        return (*child, Pinned(f"its replacement costs at least {least} sat, the budget is {most} sat"))
    if max(wanted, least) > paid.fee_sat or not whole:
        lowest = least if spends.is_void or not whole else Sat(max(least, paid.fee_sat + 1))
        return (*child, *plan_signing(members, destination_script, conditions, lowest))
    if rate * size > most:  # the server's own output can't pay more
        return (*child, FundFromReserve(rate, least), Wait())
    return (*child, Wait())


def plan_child(
    members: Sequence[Channel], paid: Settlement, pushed: Settlement | None, conditions: Conditions
) -> tuple[ChildPays, ...]:
    """Plan a child of the last settlement, if one can raise its rate. `pushed`: the child that was broadcast.

    That one stays until the fee has risen by a step.
    """
    own_sat = Sat(received_sat([member.claim for member in members]) - paid.fee_sat)
    fee = plan_child_fee(paid, own_sat, conditions.rate(members), conditions.rules_for(members))
    if pushed is not None and (fee is None or not is_outbid(pushed, fee // pushed.size)):
        return (ChildPays(pushed.fee_sat),)
    return () if fee is None else (ChildPays(fee),)


def _no_child(why: str) -> Pinned:
    return Pinned(f"{why}, and no child of the server's output can pay more")


def replacement_fee(size: int, spends: Spends, fees: ChainFees) -> Sat:
    """Lowest fee of a settlement of this size that evicts what the mempool has (BIP125 rules 3 and 4).

    It exceeds the fees of everything it evicts by its own relay. Its rate exceeds that of each transaction but the last
    settlement, which is no smaller.
    """
    evicted = [each for each in spends.mempool if each.fee_sat]
    if not evicted:
        return Sat(0)
    paid = spends.paid.txid if spends.paid else b""
    at_their_rate = [each.fee_sat * size // each.size + 1 for each in evicted if each.txid != paid]
    return Sat(max(sum(each.fee_sat for each in evicted), *at_their_rate, 0) + size * fees.increment_sat_per_vb)


# --- members --------------------------------------------------------------------------------------------------------


def fitting(members: Sequence[Channel], destination_script: bytes, conditions: Conditions) -> list[Channel]:
    """Choose the members that could each pay the common rate alone, see `fees.able_to_pay`."""
    rate, rules = conditions.rate(members), conditions.rules_for(members)
    return able_to_pay(members, destination_script, rules, rate) if len(members) > 1 else list(members)


def may_wait(channel: Channel, conditions: Conditions) -> bool:
    """Say whether a channel may be settled together with others, not at once.

    A withdrawal never is, nor a channel whose client offers a fee, which pays only its settlement, nor one near its
    deadline.
    """
    offers = channel.closing is not None and channel.closing.client_fee_sat > 0
    return not (channel.moves or offers or is_urgent(channel, conditions.rules, conditions.now))


def dearer_elsewhere(channel: Channel, paid: Settlement, others: Sequence[Channel]) -> Settlement | None:
    """Return a settlement that the record of another member stores already, and that settles this channel for more."""
    for record in others:
        other = record.closing.settlement if record.closing else None
        if other is not None and other.is_dearer_than(paid) and channel.outpoint in outpoints_of(other.transaction):
            return other
    return None


# --- the signer's limit, and the reserve ----------------------------------------------------------------------------


def lowered(sign: Sign, allowed_sat: Sat, claims: Sequence[Claim], rules: Rules, *, is_funded: bool) -> Sign | None:
    """Return the attempt at the highest fee that the signer allows; None if that is too low, or would leave dust.

    Server and signer may differ: past the deadline the server pays more than the share (`fees.pressed`), but the signer
    only from six hours before expiry, by its own clock and limits.
    `is_funded`: the reserve takes the rest, so no output is too small.
    """
    leaves_dust = not is_funded and received_sat(claims) - allowed_sat < rules.dust_sat
    is_usable = max(sign.least_sat, 1) <= allowed_sat < sign.fee_sat and not leaves_dust
    return Sign(allowed_sat, sign.least_sat) if is_usable else None


def lowered_child(child: ChildPays, allowed_sat: Sat, paid: Settlement) -> ChildPays | None:
    """Return the child at the highest fee that the signer allows; None if that would not raise its parent's rate."""
    lifts = allowed_sat * paid.size > paid.fee_sat * CHILD_BYTES
    return ChildPays(allowed_sat) if lifts and allowed_sat < child.fee_sat else None


def choose_coin(
    members: Sequence[Channel],
    public_key: bytes,
    coins: Sequence[Coin],
    attempt: FundFromReserve,
    conditions: Conditions,
) -> tuple[Reserve, Sign] | None:
    """Choose the smallest sufficient one of the reserve's confirmed coins, and the fee; None if there is none."""
    claims, rules = [member.claim for member in members], conditions.rules_for(members)
    for coin in sorted(coins, key=lambda each: each.value_sat):
        reserve = Reserve(public_key, (coin,))
        fee = plan_reserve_fee(claims, reserve, attempt.rate_sat_per_vb, rules)
        if fee is not None and fee >= attempt.least_sat:
            return reserve, Sign(fee, attempt.least_sat)
    return None
