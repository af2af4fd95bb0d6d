"""Carrying a settlement out: have it signed, hand it to the network, watch it confirm.

Each function performs one `channel.Step` and returns the command that tells the machine of it; nothing here changes a
channel. Every step may be repeated after a crash: the signer signs the same bytes again, publishing is idempotent.
What is signed, and for which fee, is decided at the `SettlementPlanner`.
"""

from __future__ import annotations

import contextlib

import structlog

from actors.context import Context
from actors.settling.planner import SettlementPlanner
from actors.settling.signing import Newer, is_signed, newest_claim, sign
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


async def perform(step: Step, channel: Channel, context: Context, planner: SettlementPlanner) -> Command | None:
    """Perform a step of settling; None means that nothing has changed yet.

    Raises:
        SignerUnavailable, SigningFailed, PublishFailed, NotEconomical: the channel stays as it is, try again later.
    """
    if channel.closing is None:
        msg = f"{channel.outpoint} is {channel.state.value}, nothing to settle"
        raise ValueError(msg)
    try:
        return await _perform(step, channel, context, planner)
    except Newer as newer:
        adopt = newer.adopt
    log.error("the record is older than what was signed", channel=str(channel.outpoint))
    return adopt


async def _perform(step: Step, channel: Channel, context: Context, planner: SettlementPlanner) -> Command | None:
    if step is Step.SIGN:
        there = await _out_already(channel, context) or await newest_claim(channel, context)
        return there or await _first(channel, context, planner)
    if channel.closing is None or channel.closing.settlement is None:
        msg = f"{channel.outpoint} has no signed settlement"
        raise ValueError(msg)
    if step is Step.PUBLISH:
        return await _publish(channel, channel.closing.settlement, context, planner)
    return await _watch(channel, channel.closing.settlement, context, planner)


async def _first(channel: Channel, context: Context, planner: SettlementPlanner) -> Command | None:
    """Have the first settlement signed; a withdrawal that can't be is taken back, unless something of it is signed."""
    try:
        return _signed(await planner.first(channel))
    except (SigningFailed, NotEconomical) as error:
        if not channel.moves or await is_signed(channel, context):
            raise
        log.warning("withdrawal is taken back", channel=str(channel.outpoint), reason=str(error))
        return TakenBack(error)


async def _out_already(channel: Channel, context: Context) -> Command | None:
    """Find what spends the output of a channel that has no settlement yet: a settlement, or a refund that is deep.

    A settlement is out since a crash, or is younger than a backup; one for an older payment than ours is to be replaced.
    """
    try:
        spend = await context.chain.spender(channel.outpoint)
        command = await judge_spend(channel, spend, context) if spend else None
    except ChainFailed:
        return None
    replaces = isinstance(command, Found) and not command.deep and is_behind(command.claim, channel)
    return None if replaces else command


async def _publish(channel: Channel, settlement: Settlement, context: Context, planner: SettlementPlanner) -> Command:
    """Hand the settlement in; one that pays less than is relayed, or is refused for what it pays, is replaced."""
    newer = await _for_newer_payment(channel, settlement, context)
    if newer is not None:
        return newer
    if is_below_floor(settlement, context.chain_view.fees):
        better = _signed(await planner.dearer(channel, None))
        if better is not None:
            return better
    try:
        await context.chain.publish(settlement.transaction)
    except ChainFailed as error:
        spend = await _spender(channel, context)
        if spend is not None and spend.confirmations >= context.depth(channel):
            end = await _end(channel, settlement, spend, context, planner)
            # ours, and handed in before: then it is published, and watching it tells how it ended
            return Published() if isinstance(end, Confirmed) else end
        kept = await _kept(channel, settlement, spend, context)
        if kept is not None and not planner.may_replace(kept.settlement):
            return kept
        better = _signed(await planner.dearer(channel, spend, refused=True))
        if better is not None:
            return better
        if kept is None:
            raise PublishFailed(reason=str(error)) from error
        planner.keeps(kept.settlement, str(error))
        return kept
    planner.told(settlement)
    return Published()


async def _watch(
    channel: Channel, settlement: Settlement, context: Context, planner: SettlementPlanner
) -> Command | None:
    spend = await _spender(channel, context)
    if spend is None:
        return Vanished()
    if spend.confirmations == 0:
        kept = await _kept(channel, settlement, spend, context)
        if kept is not None and not planner.may_replace(kept.settlement):
            return kept
        newer = await _for_newer_payment(channel, settlement, context) if planner.may_replace(settlement) else None
        if newer is not None:
            return newer
        if planner.may_tell(settlement):
            with contextlib.suppress(ChainFailed):  # in the mempool of our node, perhaps not any more in others'
                await context.chain.publish(settlement.transaction)
        return _signed(await planner.dearer(channel, spend))
    if spend.confirmations < context.depth(channel):
        return None
    return await _end(channel, settlement, spend, context, planner)


async def _for_newer_payment(channel: Channel, settlement: Settlement, context: Context) -> Signed | None:
    """Sign again where the stored settlement is for an older payment than the record's, which followed it.

    A reorg took it back. If nothing dearer can be signed, it is better than nothing.
    """
    if not lags(channel):
        return None
    try:
        newer = await sign([channel], context)
    except (SigningFailed, NotEconomical) as error:
        log.warning("the newer payment can't be signed for", channel=str(channel.outpoint), reason=str(error))
        return None
    return Signed(newer) if newer.is_dearer_than(settlement) else None


def _signed(settlement: Settlement | None) -> Signed | None:
    return None if settlement is None else Signed(settlement)


async def _kept(channel: Channel, settlement: Settlement, spend: Spend | None, context: Context) -> Kept | None:
    """Find the settlement of ours that the mempool has instead of the record's."""
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
    """Tell our settlement, also an earlier, a changed or a newer one, from the client's refund."""
    planner.pinned.pop(channel.outpoint, None)
    planner.beyond_share.pop(channel.outpoint, None)
    if spend.txid == settlement.txid:
        return Confirmed(spend.txid)
    deep = Spend(spend.txid, max(spend.confirmations, context.settlement_confirmations))  # enough for this channel
    try:
        command = await judge_spend(channel, deep, context)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error
    shown = spend.txid[::-1].hex()
    if isinstance(command, Found):
        log.warning("settlement confirmed under another txid", channel=str(channel.outpoint), txid=shown)
        return command if channel.moves or is_news(command.claim, channel) else Confirmed(spend.txid)
    log.error("funding was spent by another", channel=str(channel.outpoint), txid=shown)
    return SpentElsewhere(spend.txid)
