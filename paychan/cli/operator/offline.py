"""Settling from a backup: what of it can be settled, signed by the running signer, and handed to the network if asked.

There is no server and no store here, for the machine that had them may be gone. Each channel is settled alone, so that
one whose coins are gone holds up no other; together they would save an eighth of the fees. What the server once signed
together stays together. Everything may be done again: what is settled is seen, and the signer signs the same bytes.
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
    most_sat,
    plan_child_fee,
    plan_closing,
    pressed,
    wanted_rate,
    who_can_pay,
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
"""Channels settled side by side; the signer and the node answer them in turn anyway."""

_PAGE = 1000
"""Scripts that the chain is asked to follow in one go."""

_FUNDED_BEFORE_SECONDS = 14 * 86_400
"""Funding outputs are assumed to be no older than this when their channel is opened; only a lost wallet needs it."""

_ENDED = (State.CLOSED, State.LOST)


class Outcome(Enum):
    """What came of a channel."""

    SIGNED = "signed"
    PUBLISHED = "published"
    WAITING = "waiting"  # a settlement of ours is in the mempool already
    SETTLED = "settled"  # a settlement of ours is in the chain
    REFUNDED = "refunded"  # the client took the coins back
    REFUSED = "refused"  # by the signer, or by the network
    TOO_SMALL = "too small"  # it received less than the cheapest settlement costs
    CLOSED = "closed"  # settled before the backup was made
    LOST = "lost"  # spent by something else before the backup was made


class Result(Struct, frozen=True):
    """One channel and what came of it; `txid` is of what settled or ended it, `reason` says why nothing did."""

    channel: Channel
    outcome: Outcome
    settlement: Settlement | None = None
    txid: bytes = b""
    reason: str = ""


class _Rival(Struct, frozen=True):
    """A refund in the mempool, with what descends from it: the fees in satoshi, and its own bytes."""

    fee_sat: Sat
    size: int


class Unit(Struct, frozen=True):
    """Channels that are settled by one transaction, in the order of its inputs, and the one that is signed already."""

    members: tuple[Channel, ...]
    signed: Settlement | None = None
    parent: Settlement | None = None
    """The withdrawal whose change output the channel is funded by."""
    is_built_upon: bool = False
    """It is a withdrawal that another channel of the backup depends on: under another txid that would lose its coins."""


async def up_to_date(channels: Sequence[Channel], signer: Signer, view: View) -> list[Channel]:
    """Complete records of a backup by what the signer signed after it: the newest payments, scripts and settlements.

    Raises:
        SignerAbsent, SignerRefused: not known.
    """
    unfinished = [channel for channel in channels if channel.state not in _ENDED]
    payments = [Newest(channel.outpoint, channel.payment.change_sat) for channel in unfinished]
    known = {adopt.claim.outpoint: adopt for adopt in await news(signer, payments)}
    return [_adopted(channel, known.get(channel.outpoint), view) for channel in channels]


def _adopted(channel: Channel, adopt: Adopt | None, view: View) -> Channel:
    outcome = apply(channel, adopt, view) if adopt is not None else Accepted(channel)
    return outcome.channel if isinstance(outcome, Accepted) else channel


def sort_out(channels: Sequence[Channel], view: View) -> tuple[list[Unit], list[Result]]:
    """Tell what is to be settled, the earliest expiry first, from what is not."""
    fates, closing = [], []
    for channel in channels:
        if channel.state in _ENDED:
            fates.append(_end(channel))
            continue
        outcome = _closing(channel, view)
        if isinstance(outcome, Rejected):
            fates.append(Result(channel, Outcome.TOO_SMALL, reason=str(outcome.error)))
        else:
            closing.append(_without_application(outcome.channel, view))
    units = [_with_withdrawal(unit, channels) for unit in _units(closing, {channel.outpoint for channel in channels})]
    return sorted(units, key=lambda unit: unit.members[0].terms.expiry), fates


def _without_application(channel: Channel, view: View) -> Channel:
    """Decide about an offered payment by the operator's rule: no application is asked here."""
    silent = structs.replace(view, rules=structs.replace(view.rules, asks_application=False))
    outcome = apply(channel, Unanswered(), silent)
    return outcome.channel if isinstance(outcome, Accepted) else channel


def _closing(channel: Channel, view: View) -> Judgement:
    """Close a channel; one that closes or moves goes on as it is. The chain tells whether funding that was gone is back."""
    if channel.state is State.UNFUNDED:
        funded = apply(channel, Funded(), view)
        channel = funded.channel if isinstance(funded, Accepted) else channel
    return apply(channel, Close(CloseReason.OPERATOR), view) if channel.state is State.OPEN else Accepted(channel)


def _with_withdrawal(unit: Unit, channels: Sequence[Channel]) -> Unit:
    """Note which withdrawal a channel depends on, and whether others depend on this one."""
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
    """Group channels by the dearest settlement that spends them; one that lacks some of its channels is not used."""
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
        ]  # others are coins of the reserve
        if {member.outpoint for member in members} == set(order):
            units.append(Unit(tuple(sorted(members, key=lambda member: order.index(member.outpoint))), settlement))
        else:
            units += [Unit((member,)) for member in members]
    return units


class Settler:
    """Settles units. `chain` is asked, and given transactions, only to publish; None: nothing is published."""

    def __init__(self, signer: Signer, chain: Chain | None, view: View, fees: ChainFees, fee_rate: int | None) -> None:
        self._signer = signer
        self._chain = chain
        rules = view.rules
        self._rules = structs.replace(rules, max_fee_sat_per_vb=max(rules.max_fee_sat_per_vb, fee_rate or 0))
        self._now = view.now
        self._fees = fees
        self._fee_rate = fee_rate

    async def settle_all(self, units: Sequence[Unit], progress: Callable[[int], None]) -> list[Result]:
        """Settle all. `progress` is told how many channels are done.

        Raises:
            SignerAbsent, ChainFailed: what was published stays published; do it again.
        """
        fates: list[Result] = []
        await self._watch([member for unit in units for member in unit.members])

        async def work(waiting: Iterator[Unit]) -> None:
            for unit in waiting:
                fates.extend(await self._settle(unit))
                progress(len(fates))

        queue = iter(units)
        await asyncio.gather(*(work(queue) for _ in range(_AT_ONCE)))
        return fates

    async def _watch(self, channels: Sequence[Channel]) -> None:
        """Have the chain know what became of these, also a node that has lost what it followed for the server."""
        for begin in range(0, len(channels) if self._chain else 0, _PAGE):
            page = channels[begin : begin + _PAGE]
            since = min(channel.opened_at for channel in page) - _FUNDED_BEFORE_SECONDS
            if self._chain is not None:
                await self._chain.watch([channel.terms for channel in page], UnixTime(max(0, since)))

    async def _settle(self, unit: Unit) -> list[Result]:
        """See what the chain has, settle the rest."""
        fates: list[Result] = []
        left, rivals = list[Channel](), list[_Rival]()
        for member in unit.members:
            fate, rival = await self._look(member)
            if fate is not None and (fate.outcome is not Outcome.WAITING or not self._fee_rate):
                fates.append(fate)
            else:
                left.append(member)
                rivals += [rival] if rival else []
        whole = len(left) == len(unit.members) and await self._stays_together(unit)
        for rest in (unit,) if whole else [Unit((member,)) for member in left]:
            fates += await self._sign_and_publish(rest, rivals)
        return fates

    async def _stays_together(self, unit: Unit) -> bool:
        """Say whether all could pay alone what they are to pay together, or are to pay no more than is signed.

        What lost an input can't be mined any more.
        """
        if unit.signed is None or len(unit.members) < 2:
            return True
        members, rate = unit.members, self._fee_rate or 0
        if rate * unit.signed.size <= unit.signed.fee_sat:
            return True
        terms = members[0].terms
        script = (await self._signer.public_key(terms.client_key, terms.expiry, settling=True)).destination_script
        return len(who_can_pay(members, script, self._rules_of(members), rate)) == len(members)

    async def _look(self, channel: Channel) -> tuple[Result | None, _Rival | None]:
        """See what came of a channel so far, and the client's refund if it waits in the mempool."""
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
        there = [fate for fate in looks if fate is not None and fate.txid == settlement.txid]
        if len(there) == len(looks) and not unit.is_built_upon:
            return there  # asked for a rate that it pays already
        done, reason = Outcome.PUBLISHED if self._chain else Outcome.SIGNED, ""
        try:
            if self._chain is not None:
                await self._publish(unit, settlement)
        except ChainFailed as error:
            done, reason = Outcome.REFUSED, str(error)
            if unit.signed is not None and await self._push(unit, unit.signed):
                settlement, done = unit.signed, Outcome.PUBLISHED
        fates = [Result(member, done, settlement, settlement.txid, reason) for member in unit.members]
        if done is not Outcome.REFUSED:
            return fates
        return [(await self._look(fate.channel))[0] or fate for fate in fates]  # perhaps another one of ours is there

    async def _publish(self, unit: Unit, settlement: Settlement) -> None:
        """Hand it to the network, behind the withdrawal that it depends on; one that others depend on gets a child."""
        if self._chain is None:
            return
        if unit.parent is not None:
            with contextlib.suppress(ChainFailed):
                await self._chain.publish(unit.parent.transaction)
        if not (unit.is_built_upon and await self._push(unit, settlement)):
            await self._chain.publish(settlement.transaction)

    async def _push(self, unit: Unit, settlement: Settlement) -> bool:
        """Let a child of our own output pay for what can't be replaced; whether one does."""
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
        """Return what is signed already if that pays enough, or else the dearest that the signer gives.

        Raises:
            NotEconomical, SignerRefused: there is none.
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
        """Sign at the rate asked for, or the curve's; a little higher where the signer once signed for as much."""
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
        """Rules for settling these now; past the deadline a rate that is asked for is what is needed."""
        estimate = self._fee_rate or self._fees.estimate_sat_per_vb
        fees = structs.replace(self._fees, estimate_sat_per_vb=estimate)
        return pressed(self._rules, members, self._now, fees)

    def _rate(self, members: Sequence[Channel]) -> int:
        wanted = (wanted_rate(member, self._rules, self._now, self._fees) for member in members)
        return self._fee_rate or max(wanted)

    def _least(self, size: int, rivals: Sequence[_Rival]) -> Sat:
        """Fee that throws these out of the mempool: more than all of theirs (BIP125), at a higher rate than each."""
        if not rivals:
            return Sat(0)
        fees = sum(rival.fee_sat for rival in rivals)
        at_their_rate = max(rival.fee_sat * size // rival.size + 1 for rival in rivals)
        return Sat(max(fees, at_their_rate) + size * self._fees.increment_sat_per_vb)


def _stored(channel: Channel) -> Settlement | None:
    return channel.closing.settlement if channel.closing else None
