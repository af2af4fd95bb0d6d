"""Settling from a backup: selects the channels to settle, lets the running signer sign, and broadcasts on request.

This runs without server and store, because their machine may be lost. Each channel settles alone, so that one whose
coins are gone delays no other; batches would save an eighth of the fees. Channels that the server once signed together
stay together. Every step may be repeated: settled channels are recognised, and the signer signs the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

from msgspec import Struct, structs

from paychan.chain.base import Chain, ChainFailed
from paychan.protocol.channel import (
    Accepted,
    Adopt,
    Channel,
    Close,
    CloseReason,
    Funded,
    Rejected,
    Rules,
    State,
    Unanswered,
    View,
)
from paychan.protocol.channel import Outcome as Judgement
from paychan.protocol.errors import NotEconomical
from paychan.protocol.fees import (
    ChainFees,
    Shortfall,
    able_to_pay,
    most_sat,
    plan_child_fee,
    plan_closing,
    pressed,
    wanted_rate,
)
from paychan.protocol.settlement import (
    Settlement,
    base_size,
    outpoints_of,
    settlement_size,
    spends_by_server_branch,
)
from paychan.protocol.state_machine import apply
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import Newest
from paychan.signer_client.base import Signer, SignerRefused, news, sign_for_no_less

_AT_ONCE = 32
"""Channels settled concurrently; the signer and the node handle their requests one by one anyway."""

_PAGE = 1000
"""Scripts that the chain is asked to watch in one call."""

_FUNDED_BEFORE_SECONDS = 14 * 86_400
"""Assumed largest age of a funding output when its channel opens; needed only if the node's wallet was lost."""

_ENDED = (State.CLOSED, State.LOST)


class Outcome(Enum):
    """The result for a channel."""

    SIGNED = "signed"
    PUBLISHED = "published"
    WAITING = "waiting"  # a settlement by the server's branch is already in the mempool
    SETTLED = "settled"  # a settlement by the server's branch is in the chain
    REFUNDED = "refunded"  # the client took the coins back
    REFUSED = "refused"  # by the signer, or by the node
    TOO_SMALL = "too small"  # the channel received less than the cheapest settlement costs
    CLOSED = "closed"  # settled before the backup was made
    LOST = "lost"  # another transaction spent the coins before the backup was made


class Result(Struct, frozen=True):
    """A channel and its outcome; `txid` is of the transaction that spent the coins, `reason` says why there is none."""

    channel: Channel
    outcome: Outcome
    settlement: Settlement | None = None
    txid: bytes = b""
    reason: str = ""


class _Rival(Struct, frozen=True):
    """A refund in the mempool: the fees of it and its descendants in satoshi, and its own size in bytes."""

    fee_sat: Sat
    size: int


class Unit(Struct, frozen=True):
    """Channels that one transaction settles, in the order of its inputs, and the transaction if it is already signed."""

    members: tuple[Channel, ...]
    signed: Settlement | None = None
    parent: Settlement | None = None
    """The withdrawal whose change output funds the channel."""
    is_built_upon: bool = False
    """Whether this withdrawal funds another channel of the backup, which would lose its coins with another txid."""


async def up_to_date(channels: Sequence[Channel], signer: Signer, view: View) -> list[Channel]:
    """Update records of a backup with what the signer signed or saw later: newest payments, scripts and settlements.

    Raises:
        SignerAbsent, SignerRefused: the signer did not answer the question.
    """
    unfinished = [channel for channel in channels if channel.state not in _ENDED]
    payments = [Newest(channel.outpoint, channel.payment.change_sat) for channel in unfinished]
    known = {adopt.claim.outpoint: adopt for adopt in await news(signer, payments)}
    return [_adopted(channel, known.get(channel.outpoint), view) for channel in channels]


def _adopted(channel: Channel, adopt: Adopt | None, view: View) -> Channel:
    outcome = apply(channel, adopt, view) if adopt is not None else Accepted(channel)
    return outcome.channel if isinstance(outcome, Accepted) else channel


def sort_out(channels: Sequence[Channel], view: View) -> tuple[list[Unit], list[Result]]:
    """Return the channels to settle as units, the earliest expiry first, and the results of the other channels."""
    results, closing = [], []
    for channel in channels:
        if channel.state in _ENDED:
            results.append(_end(channel))
            continue
        outcome = _closing(channel, view)
        if isinstance(outcome, Rejected):
            results.append(Result(channel, Outcome.TOO_SMALL, reason=str(outcome.error)))
        else:
            closing.append(_without_application(outcome.channel, view))
    units = [_with_withdrawal(unit, channels) for unit in _units(closing, {channel.outpoint for channel in channels})]
    return sorted(units, key=lambda unit: unit.members[0].terms.expiry), results


def _without_application(channel: Channel, view: View) -> Channel:
    """Decide about an offered payment by the operator's rule: there is no application to ask."""
    silent = structs.replace(view, rules=structs.replace(view.rules, asks_application=False))
    outcome = apply(channel, Unanswered(), silent)
    return outcome.channel if isinstance(outcome, Accepted) else channel


def _closing(channel: Channel, view: View) -> Judgement:
    """Close an open channel; one that is closing or moving stays as it is.

    An unfunded channel counts as funded: the chain decides.
    """
    if channel.state is State.UNFUNDED:
        funded = apply(channel, Funded(), view)
        channel = funded.channel if isinstance(funded, Accepted) else channel
    return apply(channel, Close(CloseReason.OPERATOR), view) if channel.state is State.OPEN else Accepted(channel)


def _with_withdrawal(unit: Unit, channels: Sequence[Channel]) -> Unit:
    """Add the withdrawal that a channel depends on, and whether other channels depend on this one."""
    moved = {
        OutPoint(settlement.txid, 0): settlement
        for channel in channels
        if channel.moves and (settlement := _stored(channel)) is not None
    }
    used = {channel.outpoint for channel in channels if channel.is_used}
    parent = next((moved[member.outpoint] for member in unit.members if member.outpoint in moved), None)
    moves = unit.signed is not None and any(member.moves for member in unit.members)
    is_built_upon = moves and unit.signed is not None and OutPoint(unit.signed.txid, 0) in used
    return structs.replace(unit, parent=parent, is_built_upon=is_built_upon)


def _end(channel: Channel) -> Result:
    settlement = _stored(channel)
    txid = channel.closing.spent_by if channel.closing else b""
    outcome = Outcome.CLOSED if channel.state is State.CLOSED else Outcome.LOST
    return Result(channel, outcome, txid=txid or (settlement.txid if settlement else b""))


def _units(closing: Sequence[Channel], known: set[OutPoint]) -> list[Unit]:
    """Group channels by the settlement with the highest fee that spends them; one that lacks a channel here is not used."""
    signed: dict[OutPoint, Settlement] = {}
    for channel in closing:
        settlement = _stored(channel)
        for outpoint in outpoints_of(settlement.transaction) if settlement else ():
            if settlement and (outpoint not in signed or settlement.is_dearer_than(signed[outpoint])):
                signed[outpoint] = settlement
    groups: dict[bytes, list[Channel]] = defaultdict(list)
    units = []
    for channel in closing:
        if channel.outpoint in signed:
            groups[signed[channel.outpoint].txid].append(channel)
        else:
            units.append(Unit((channel,)))
    for members in groups.values():
        settlement = signed[members[0].outpoint]
        order = [
            outpoint for outpoint in outpoints_of(settlement.transaction) if outpoint in known
        ]  # the other inputs are coins of the reserve
        if {member.outpoint for member in members} == set(order):
            units.append(Unit(tuple(sorted(members, key=lambda member: order.index(member.outpoint))), settlement))
        else:
            units += [Unit((member,)) for member in members]
    return units


class Settler:
    """Settles units. `chain` is read and used for broadcasts only when publishing; None: no broadcast."""

    def __init__(self, signer: Signer, chain: Chain | None, view: View, fees: ChainFees, fee_rate: int | None) -> None:
        self._signer = signer
        self._chain = chain
        rules = view.rules
        self._rules = structs.replace(rules, max_fee_sat_per_vb=max(rules.max_fee_sat_per_vb, fee_rate or 0))
        self._now = view.now
        self._fees = fees
        self._fee_rate = fee_rate

    async def settle_all(self, units: Sequence[Unit], progress: Callable[[int], None]) -> list[Result]:
        """Settle all units. `progress` is called with the number of finished channels.

        Raises:
            SignerAbsent, ChainFailed: earlier broadcasts remain valid; repeat the call.
        """
        results: list[Result] = []
        await self._watch([member for unit in units for member in unit.members])

        async def work(waiting: Iterator[Unit]) -> None:
            for unit in waiting:
                results.extend(await self._settle(unit))
                progress(len(results))

        queue = iter(units)
        await asyncio.gather(*(work(queue) for _ in range(_AT_ONCE)))
        return results

    async def _watch(self, channels: Sequence[Channel]) -> None:
        """Let the chain find the spends of these channels, even if the node's wallet was lost."""
        for begin in range(0, len(channels) if self._chain else 0, _PAGE):
            page = channels[begin : begin + _PAGE]
            since = min(channel.opened_at for channel in page) - _FUNDED_BEFORE_SECONDS
            if self._chain is not None:
                await self._chain.watch([channel.terms for channel in page], UnixTime(max(0, since)))

    async def _settle(self, unit: Unit) -> list[Result]:
        """Read the state of the chain, and settle the remaining channels."""
        results: list[Result] = []
        left, rivals = list[Channel](), list[_Rival]()
        for member in unit.members:
            result, rival = await self._look(member)
            if result is not None and (result.outcome is not Outcome.WAITING or not self._fee_rate):
                results.append(result)
            else:
                left.append(member)
                rivals += [rival] if rival else []
        whole = len(left) == len(unit.members) and await self._stays_together(unit)
        for rest in (unit,) if whole else [Unit((member,)) for member in left]:
            results += await self._sign_and_publish(rest, rivals)
        return results

    async def _stays_together(self, unit: Unit) -> bool:
        """Return whether all members can pay their share of the rate alone, or the signed settlement already pays it.

        A settlement that lost one input can't be mined.
        """
        if unit.signed is None or len(unit.members) < 2:
            return True
        members, rate = unit.members, self._fee_rate or 0
        if rate * unit.signed.size <= unit.signed.fee_sat:
            return True
        terms = members[0].terms
        script = (await self._signer.public_key(terms.client_key, terms.expiry, settling=True)).destination_script
        return len(able_to_pay(members, script, self._rules_of(members), rate)) == len(members)

    async def _look(self, channel: Channel) -> tuple[Result | None, _Rival | None]:
        """Return the channel's result so far, and the client's refund if it waits in the mempool."""
        spend = await self._chain.spender(channel.outpoint) if self._chain else None
        if self._chain is None or spend is None:
            return None, None
        spending = await self._chain.transaction(spend.txid)
        if spends_by_server_branch(spending, channel.outpoint):
            outcome, stored = Outcome.SETTLED if spend.confirmations else Outcome.WAITING, _stored(channel)
            known = stored if stored and stored.txid == spend.txid else None
            return Result(channel, outcome, known, spend.txid), None
        if spend.confirmations:
            return Result(channel, Outcome.REFUNDED, txid=spend.txid), None
        cost = await self._chain.replacement_cost(spend.txid)
        return None, _Rival(cost, base_size(spending)) if cost else None

    async def _sign_and_publish(self, unit: Unit, rivals: Sequence[_Rival]) -> list[Result]:
        try:
            settlement = await self._sign(unit, rivals)
        except NotEconomical as error:
            return [Result(member, Outcome.TOO_SMALL, reason=str(error)) for member in unit.members]
        except SignerRefused as error:
            return [Result(member, Outcome.REFUSED, reason=str(error)) for member in unit.members]
        looks = [(await self._look(member))[0] for member in unit.members]
        existing = [result for result in looks if result is not None and result.txid == settlement.txid]
        if len(existing) == len(looks) and not unit.is_built_upon:
            return existing  # the settlement already pays the requested rate
        done, reason = Outcome.PUBLISHED if self._chain else Outcome.SIGNED, ""
        try:
            if self._chain is not None:
                await self._publish(unit, settlement)
        except ChainFailed as error:
            done, reason = Outcome.REFUSED, str(error)
            if unit.signed is not None and await self._push(unit, unit.signed):
                settlement, done = unit.signed, Outcome.PUBLISHED
        results = [Result(member, done, settlement, settlement.txid, reason) for member in unit.members]
        if done is not Outcome.REFUSED:
            return results
        return [
            (await self._look(result.channel))[0] or result for result in results
        ]  # another settlement may be there

    async def _publish(self, unit: Unit, settlement: Settlement) -> None:
        """Broadcast the settlement after the withdrawal that it depends on; one that others depend on gets a child."""
        if self._chain is None:
            return
        if unit.parent is not None:
            with contextlib.suppress(ChainFailed):
                await self._chain.publish(unit.parent.transaction)
        if not (unit.is_built_upon and await self._push(unit, settlement)):
            await self._chain.publish(settlement.transaction)

    async def _push(self, unit: Unit, settlement: Settlement) -> bool:
        """Let a child of the server's output pay for a settlement that can't be replaced; return whether it does."""
        own_sat = Sat(sum(member.received_sat for member in unit.members) - settlement.fee_sat)
        fee = plan_child_fee(settlement, own_sat, self._rate(unit.members), self._rules_of(unit.members))
        if fee is None or self._chain is None:
            return False
        claims, terms = [member.claim for member in unit.members], unit.members[0].terms
        try:
            script = (await self._signer.public_key(terms.client_key, terms.expiry, settling=True)).destination_script
            child = await self._signer.sign_child(claims, script, settlement.fee_sat, fee)
            await self._chain.publish(settlement.transaction, child.transaction)
        except (SignerRefused, ChainFailed):
            return False
        return True

    async def _sign(self, unit: Unit, rivals: Sequence[_Rival]) -> Settlement:
        """Return the signed settlement if its fee suffices, or else the highest that the signer signs.

        Raises:
            NotEconomical, SignerRefused: there is no settlement.
        """
        signed = unit.signed
        if signed and unit.is_built_upon:
            return signed
        if signed and signed.fee_sat >= max(
            (self._fee_rate or self._fees.floor_sat_per_vb) * signed.size, self._least(signed.size, rivals)
        ):
            return signed
        try:
            dearer = await self._sign_anew(unit.members, rivals)
        except (NotEconomical, SignerRefused):
            if signed is None:
                raise
            return signed
        return dearer if signed is None or dearer.is_dearer_than(signed) else signed

    async def _sign_anew(self, members: Sequence[Channel], rivals: Sequence[_Rival]) -> Settlement:
        """Sign at the requested rate or the curve's; slightly higher if the signer has already signed for that rate."""
        claims, rules, terms = [member.claim for member in members], self._rules_of(members), members[0].terms
        script = (await self._signer.public_key(terms.client_key, terms.expiry, settling=True)).destination_script
        plan = plan_closing(members, script, rules, self._rate(members))
        if isinstance(plan, Shortfall):
            raise NotEconomical(got_sat=plan.received_sat, need_sat=plan.needed_sat)
        size = settlement_size(claims, script)
        most = most_sat(claims, size, rules, script)
        fee = max(plan, min(most, self._least(size, rivals)))
        transactions = self._chain.transaction if self._chain else None
        return await sign_for_no_less(self._signer, claims, script, fee, most, transactions=transactions)

    def _rules_of(self, members: Sequence[Channel]) -> Rules:
        """Return the rules for settling these channels now; after the deadline, a requested rate counts as the needed one."""
        estimate = self._fee_rate or self._fees.estimate_sat_per_vb
        fees = structs.replace(self._fees, estimate_sat_per_vb=estimate)
        return pressed(self._rules, members, self._now, fees)

    def _rate(self, members: Sequence[Channel]) -> int:
        wanted = (wanted_rate(member, self._rules, self._now, self._fees) for member in members)
        return self._fee_rate or max(wanted)

    def _least(self, size: int, rivals: Sequence[_Rival]) -> Sat:
        """Return the fee that replaces these in the mempool: more than all their fees (BIP125), at a higher rate than each."""
        if not rivals:
            return Sat(0)
        fees = sum(rival.fee_sat for rival in rivals)
        at_their_rate = max(rival.fee_sat * size // rival.size + 1 for rival in rivals)
        return Sat(max(fees, at_their_rate) + size * self._fees.increment_sat_per_vb)


def _stored(channel: Channel) -> Settlement | None:
    return channel.closing.settlement if channel.closing else None
