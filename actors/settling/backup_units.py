"""Settling from a backup, first part: which of its channels to settle, and which of them together.

Each channel settles alone, so that one whose coins are gone delays no other; batches would save an eighth of the fees.
Channels that the server once signed together stay together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from enum import Enum

from msgspec import Struct, structs

from paychan.protocol.channel import (
    Accepted,
    Adopt,
    Channel,
    Close,
    CloseReason,
    Funded,
    Rejected,
    State,
    Unanswered,
    View,
)
from paychan.protocol.channel import Outcome as Judgement
from paychan.protocol.settlement import Settlement, outpoints_of
from paychan.protocol.state_machine import apply
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.signer_messages import Newest
from paychan.signer_client.base import Signer, news

_ENDED = (State.CLOSED, State.LOST)


class Outcome(Enum):
    """The result for a channel."""

    PLANNED = "planned"  # nothing was signed
    SIGNED = "signed"
    PUBLISHED = "published"
    WAITING = "waiting"  # a settlement by the server's branch is already in the mempool
    SETTLED = "settled"  # a settlement by the server's branch is in the chain
    REFUNDED = "refunded"  # the client took the coins back
    REFUSED = "refused"  # by the signer, or by the node
    TOO_SMALL = "too small"  # the channel received less than the cheapest settlement costs
    CLOSED = "closed"  # settled before the backup was made
    LOST = "lost"  # another transaction spent the coins before the backup was made


class Plan(Struct, frozen=True):
    """A settlement that was not signed: the first channel that it would settle, its fee, and where it would pay."""

    first: OutPoint
    fee_sat: Sat
    destination_script: bytes


class Result(Struct, frozen=True):
    """A channel and its outcome; `txid` is of the transaction that spent the coins, `reason` says why there is none."""

    channel: Channel
    outcome: Outcome
    settlement: Settlement | None = None
    txid: bytes = b""
    reason: str = ""
    plan: Plan | None = None
    """The settlement that would be signed, if nothing is."""
    confirmations: int = 0
    """Confirmations of the transaction that spent the coins; 0 also if the chain was not asked."""


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
    return sorted(units, key=lambda unit: unit.members[0].terms.expiry.lock_time), results


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
        if channel.moves and (settlement := stored_settlement(channel)) is not None
    }
    used = {channel.outpoint for channel in channels if channel.is_used}
    parent = next((moved[member.outpoint] for member in unit.members if member.outpoint in moved), None)
    moves = unit.signed is not None and any(member.moves for member in unit.members)
    is_built_upon = moves and unit.signed is not None and OutPoint(unit.signed.txid, 0) in used
    return structs.replace(unit, parent=parent, is_built_upon=is_built_upon)


def _end(channel: Channel) -> Result:
    settlement = stored_settlement(channel)
    txid = channel.closing.spent_by if channel.closing else b""
    outcome = Outcome.CLOSED if channel.state is State.CLOSED else Outcome.LOST
    return Result(channel, outcome, txid=txid or (settlement.txid if settlement else b""))


def _units(closing: Sequence[Channel], known: set[OutPoint]) -> list[Unit]:
    """Group channels by the settlement with the highest fee that spends them; one that lacks a channel here is not used."""
    signed: dict[OutPoint, Settlement] = {}
    for channel in closing:
        settlement = stored_settlement(channel)
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


def stored_settlement(channel: Channel) -> Settlement | None:
    """Return the settlement in a channel's record."""
    return channel.closing.settlement if channel.closing else None
