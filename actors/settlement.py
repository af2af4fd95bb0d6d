"""Carrying a settlement out: ask the signer, hand to the network, watch it confirm.

Each function performs one `channel.Step` and returns the command that tells the machine of it; nothing here changes a
channel. Every step may be repeated after a crash: the signer signs the same bytes again, publishing is idempotent.
"""

from __future__ import annotations

import contextlib

import structlog
from msgspec.structs import replace

from actors.world import World
from paychan.chain.base import ChainFailed, Spend
from paychan.protocol.channel import (
    Channel,
    Closing,
    Command,
    Confirmed,
    Published,
    Signed,
    SpentElsewhere,
    Step,
    Vanished,
)
from paychan.protocol.errors import NotEconomical, PublishFailed, SignerUnavailable, SigningFailed
from paychan.protocol.fees import plan_closing
from paychan.protocol.settlement import Settlement, Shortfall, pays_the_same
from paychan.signing.base import SignerAbsent, SignerRefused

log = structlog.get_logger("settlement")


async def perform(step: Step, channel: Channel, world: World) -> Command | None:
    """Perform a step of settling; None means that nothing has changed yet.

    Raises:
        SignerUnavailable, SigningFailed, PublishFailed, NotEconomical: the channel stays as it is, try again later.
    """
    if channel.closing is None:
        msg = f"{channel.outpoint} is {channel.state.value}, nothing to settle"
        raise ValueError(msg)
    if step is Step.SIGN:
        return Signed(await _sign(channel, channel.closing, world))
    if channel.closing.settlement is None:
        msg = f"{channel.outpoint} has no signed settlement"
        raise ValueError(msg)
    if step is Step.PUBLISH:
        return await _publish(channel, channel.closing.settlement, world)
    return await _watch(channel, channel.closing.settlement, world)


async def _sign(channel: Channel, closing: Closing, world: World) -> Settlement:
    try:
        key = await world.signer.public_key(channel.terms.client_key, channel.terms.expiry)
        rules = replace(world.rules, fee_sat_per_vb=await _rate(world))
        fee = plan_closing(channel, key.destination_script, rules, closing.reason, closing.client_fee_sat)
        if isinstance(fee, Shortfall):
            raise NotEconomical(got_sat=fee.received_sat, need_sat=fee.needed_sat)
        return await world.signer.sign_settlement([channel.claim], key.destination_script, fee)
    except SignerAbsent as error:
        raise SignerUnavailable(reason=str(error)) from error
    except SignerRefused as error:
        raise SigningFailed(reason=str(error)) from error


async def _rate(world: World) -> int:
    """The chain's estimate within the operator's cap, or the configured rate where there is none."""
    try:
        estimate = await world.chain.fee_rate()
    except ChainFailed:
        estimate = None
    return world.rules.fee_sat_per_vb if estimate is None else min(estimate, world.max_fee_sat_per_vb)


async def _publish(channel: Channel, settlement: Settlement, world: World) -> Command:
    try:
        await world.chain.publish(settlement.transaction)
    except ChainFailed as error:
        spend = await _spender(channel, world)
        if spend is not None and spend.confirmations >= world.settlement_confirmations:
            return await _end(channel, settlement, spend, world)
        raise PublishFailed(reason=str(error)) from error
    return Published()


async def _watch(channel: Channel, settlement: Settlement, world: World) -> Command | None:
    spend = await _spender(channel, world)
    if spend is None:
        return Vanished()
    if spend.confirmations == 0:
        with contextlib.suppress(ChainFailed):  # in the mempool of our node, perhaps not any more in others'
            await world.chain.publish(settlement.transaction)
    if spend.confirmations < world.settlement_confirmations:
        return None
    return await _end(channel, settlement, spend, world)


async def _spender(channel: Channel, world: World) -> Spend | None:
    try:
        return await world.chain.spender(channel.outpoint)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error


async def _end(channel: Channel, settlement: Settlement, spend: Spend, world: World) -> Command:
    """Tell our settlement from the client's refund; under another txid it was malleated on its way, and pays the same."""
    if spend.txid == settlement.txid:
        return Confirmed()
    try:
        spending = await world.chain.transaction(spend.txid)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error
    shown = spend.txid[::-1].hex()
    if pays_the_same(settlement.transaction, spending):
        log.warning("settlement confirmed under another txid", channel=str(channel.outpoint), txid=shown)
        return Confirmed()
    log.error("funding was spent by another", channel=str(channel.outpoint), txid=shown)
    return SpentElsewhere(spend.txid)
