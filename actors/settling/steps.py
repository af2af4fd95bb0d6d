"""The steps of a settlement: have it signed, broadcast it, watch it confirm.

Each function performs one `channel.Step` and returns the command that tells the state machine the result; no function
changes a channel. Every step may be repeated after a crash: the signer signs the same bytes again, and broadcasting is
idempotent. The `SettlementPlanner` decides the members and the fee of a settlement.
"""

from __future__ import annotations

import contextlib

import structlog

from actors.context import Context
from actors.settling.planner import SettlementPlanner
from actors.settling.signing import Newer, is_signed, newest_claim
from actors.settling.spends import judge_spend
from paychan.chain.base import ChainFailed, Spend
from paychan.protocol.channel import (
    Channel,
    Command,
    Confirmed,
    Found,
    Kept,
    Published,
    Signed,
    SpentElsewhere,
    Step,
    TakenBack,
    Vanished,
)
from paychan.protocol.errors import NotEconomical, PublishFailed, SigningFailed
from paychan.protocol.fees import is_below_floor
from paychan.protocol.finding import is_behind, is_news, lags
from paychan.protocol.settlement import Settlement

log = structlog.get_logger("settlement")


async def perform(step: Step, channel: Channel, context: Context, planner: SettlementPlanner | None) -> Command | None:
    """Perform a step of the settlement; None means that nothing has changed yet.

    `planner` is None in a process that only serves: the process that settles performs the step.

    Raises:
        SignerUnavailable, SigningFailed, PublishFailed, NotEconomical: the channel stays as it is; try again later.
    """
    if channel.closing is None:
        msg = f"{channel.outpoint} is {channel.state.value}, nothing to settle"
        raise ValueError(msg)
    if planner is None:
        return None
    try:
        return await _perform(step, channel, context, planner)
    except Newer as newer:
        adopt = newer.adopt
    log.error("the record is older than the signed claim", channel=str(channel.outpoint))
    return adopt


async def _perform(step: Step, channel: Channel, context: Context, planner: SettlementPlanner) -> Command | None:
    if step is Step.SIGN:
        earlier = await _broadcast_before(channel, context) or await newest_claim(channel, context)
        return earlier or await _first(channel, context, planner)
    if channel.closing is None or channel.closing.settlement is None:
        msg = f"{channel.outpoint} has no signed settlement"
        raise ValueError(msg)
    if step is Step.PUBLISH:
        return await _publish(channel, channel.closing.settlement, context, planner)
    return await _watch(channel, channel.closing.settlement, context, planner)


async def _first(channel: Channel, context: Context, planner: SettlementPlanner) -> Command | None:
    """Have the first settlement signed; cancel a withdrawal that can't be, unless the signer has signed for it."""
    try:
        return _signed(await planner.first(channel))
    except (SigningFailed, NotEconomical) as error:
        if not channel.moves or await is_signed(channel, context):
            raise
        log.warning("withdrawal is cancelled", channel=str(channel.outpoint), reason=str(error))
        return TakenBack(error)


async def _broadcast_before(channel: Channel, context: Context) -> Command | None:
    """Find the spend of a channel that has no stored settlement: a settlement, or a deep refund.

    Such a settlement was broadcast before a crash, or after the backup that the record is from. One for an older
    payment than the record's is not returned while it is unconfirmed: a new one replaces it.
    """
    try:
        spend = await context.chain.spender(channel.outpoint)
        command = await judge_spend(channel, spend, context) if spend else None
    except ChainFailed:
        return None
    replaces = isinstance(command, Found) and not command.deep and is_behind(command.claim, channel)
    return None if replaces else command


async def _publish(channel: Channel, settlement: Settlement, context: Context, planner: SettlementPlanner) -> Command:
    """Broadcast the settlement; replace it if it pays less than the relay minimum, or if the node refuses its fee."""
    newer = await _for_newer_payment(channel, settlement, planner)
    if newer is not None:
        return newer
    if is_below_floor(settlement, context.chain_view.fees):
        better = _signed(await planner.fee_bump(channel, None))
        if better is not None:
            return better
    try:
        await context.chain.publish(settlement.transaction)
    except ChainFailed as error:
        spend = await _spender(channel, context)
        if spend is not None and spend.confirmations >= context.depth(channel):
            end = await _end(channel, settlement, spend, context, planner)
            # a settlement that was broadcast before counts as published; the next step watches how it ends
            return Published() if isinstance(end, Confirmed) else end
        kept = await _kept(channel, settlement, spend, context)
        if kept is not None and not planner.broadcasts.may_replace(kept.settlement):
            return kept
        better = _signed(await planner.fee_bump(channel, spend, refused=True))
        if better is not None:
            return better
        if kept is None:
            raise PublishFailed(reason=str(error)) from error
        planner.broadcasts.note_kept(kept.settlement, str(error))
        return kept
    planner.broadcasts.note(settlement)
    return Published()


async def _watch(
    channel: Channel, settlement: Settlement, context: Context, planner: SettlementPlanner
) -> Command | None:
    spend = await _spender(channel, context)
    if spend is None:
        return Vanished()
    if spend.confirmations == 0:
        kept = await _kept(channel, settlement, spend, context)
        if kept is not None and not planner.broadcasts.may_replace(kept.settlement):
            return kept
        newer = (
            await _for_newer_payment(channel, settlement, planner)
            if planner.broadcasts.may_replace(settlement)
            else None
        )
        if newer is not None:
            return newer
        if planner.broadcasts.may_repeat(settlement):
            with contextlib.suppress(ChainFailed):  # the server's node has it, but other nodes may have evicted it
                await context.chain.publish(settlement.transaction)
        return _signed(await planner.fee_bump(channel, spend))
    if spend.confirmations < context.depth(channel):
        return None
    return await _end(channel, settlement, spend, context, planner)


async def _for_newer_payment(channel: Channel, settlement: Settlement, planner: SettlementPlanner) -> Signed | None:
    """Sign again if the stored settlement, which the record took over from the chain, is for an older payment.

    A reorg has removed that settlement. If no settlement with a higher rate can be signed, the stored one stays.
    """
    if not lags(channel):
        return None
    try:
        newer = await planner.sign([channel])
    except (SigningFailed, NotEconomical) as error:
        log.warning("no settlement of the newer payment", channel=str(channel.outpoint), reason=str(error))
        return None
    return Signed(newer) if newer.is_dearer_than(settlement) else None


def _signed(settlement: Settlement | None) -> Signed | None:
    return None if settlement is None else Signed(settlement)


async def _kept(channel: Channel, settlement: Settlement, spend: Spend | None, context: Context) -> Kept | None:
    """Find the server's settlement that the mempool has instead of the record's."""
    if spend is None or spend.confirmations or spend.txid == settlement.txid:
        return None
    try:
        command = await judge_spend(channel, spend, context)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error
    return Kept(command.settlement) if isinstance(command, Found) else None


async def _spender(channel: Channel, context: Context) -> Spend | None:
    try:
        return await context.chain.spender(channel.outpoint)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error


async def _end(
    channel: Channel, settlement: Settlement, spend: Spend, context: Context, planner: SettlementPlanner
) -> Command:
    """Distinguish a settlement by the server (also an earlier, changed or newer one) from the client's refund."""
    planner.pinned.pop(channel.outpoint, None)
    planner.beyond_share.pop(channel.outpoint, None)
    if spend.txid == settlement.txid:
        return Confirmed(spend.txid)
    deep = Spend(spend.txid, max(spend.confirmations, context.settlement_confirmations))  # deep enough for this channel
    try:
        command = await judge_spend(channel, deep, context)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error
    shown = spend.txid[::-1].hex()
    if isinstance(command, Found):
        log.warning("settlement confirmed under another txid", channel=str(channel.outpoint), txid=shown)
        return command if channel.moves or is_news(command.claim, channel) else Confirmed(spend.txid)
    log.error("another party spent the funding output", channel=str(channel.outpoint), txid=shown)
    return SpentElsewhere(spend.txid)
