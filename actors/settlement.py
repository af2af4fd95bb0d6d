"""Carrying a settlement out: ask the signer, hand to the network, watch it confirm.

Each function performs one `channel.Step` and returns the command that tells the machine of it; nothing here changes a
channel. Every step may be repeated after a crash: the signer signs the same bytes again, publishing is idempotent.
"""

from __future__ import annotations

from actors.world import World
from paychan.chain.base import ChainFailed
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
from paychan.protocol.machine import plan_closing
from paychan.protocol.settlement import Settlement, Shortfall
from paychan.signing.base import SignerAbsent, SignerRefused


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
        return await _publish(channel.closing.settlement, world)
    return await _watch(channel, channel.closing.settlement, world)


async def _sign(channel: Channel, closing: Closing, world: World) -> Settlement:
    try:
        key = await world.signer.public_key(channel.terms.client_key, channel.terms.expiry)
        fee = plan_closing(channel, key.destination_script, world.rules, closing.reason, closing.client_fee_sat)
        if isinstance(fee, Shortfall):
            raise NotEconomical(got_sat=fee.received_sat, need_sat=fee.needed_sat)
        return await world.signer.sign_settlement([channel.claim], key.destination_script, fee)
    except SignerAbsent as error:
        raise SignerUnavailable(reason=str(error)) from error
    except SignerRefused as error:
        raise SigningFailed(reason=str(error)) from error


async def _publish(settlement: Settlement, world: World) -> Command:
    try:
        await world.chain.publish(settlement.transaction)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error
    return Published()


async def _watch(channel: Channel, settlement: Settlement, world: World) -> Command | None:
    try:
        spend = await world.chain.spender(channel.outpoint)
    except ChainFailed as error:
        raise PublishFailed(reason=str(error)) from error
    if spend is None:
        return Vanished()
    if spend.confirmations < world.settlement_confirmations:
        return None
    return Confirmed() if spend.txid == settlement.txid else SpentElsewhere(spend.txid)
