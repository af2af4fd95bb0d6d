"""Drained channels that wait for others, to be settled together.

The actors of the channels call one by one; the first call after the wait signs for all of them. Nothing here must
survive a restart: the records hold since when a channel is closing, and the signed settlement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from actors.context import Context
from actors.settling.signing import conditions_of, destination_of, signer_errors
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Channel
from paychan.protocol.errors import NotEconomical, SignerUnavailable, SigningFailed
from paychan.protocol.settlement import Settlement
from paychan.protocol.settlement_plan import fitting, may_wait
from paychan.protocol.types import OutPoint

log = structlog.get_logger("batches")

_SignAll = Callable[[Sequence[Channel]], Awaitable[Settlement]]


class Batches:
    """Forms batches of closing channels. `sign` has one settlement of several channels signed."""

    def __init__(self, context: Context, sign: _SignAll) -> None:
        self._context = context
        self._sign = sign
        self._waiting: dict[OutPoint, Channel] = {}
        self._batches: dict[OutPoint, asyncio.Task[dict[OutPoint, Settlement]]] = {}

    def waits(self, channel: Channel) -> bool:
        """Say whether a channel waits for others now."""
        return channel.outpoint in self._waiting

    async def settle(self, channel: Channel) -> Settlement | None:
        """Return the settlement of a channel together with others; None if it waits, or settles alone."""
        batch = self._batches.pop(channel.outpoint, None) or self._form(channel)
        if batch is None:
            return None
        self._batches.pop(channel.outpoint, None)
        return (await asyncio.shield(batch)).get(channel.outpoint)

    def _form(self, channel: Channel) -> asyncio.Task[dict[OutPoint, Settlement]] | None:
        """Let a drained channel wait for others; settle them when the limit of time or number is reached.

        A channel with change never waits, but settles together with waiting channels.
        """
        context, now = self._context, self._context.paying_time()
        if not context.batch_seconds or not may_wait(channel, conditions_of(context)):
            self._waiting.pop(channel.outpoint, None)
            return None
        members = [waiting for waiting in self._waiting.values() if waiting.outpoint != channel.outpoint]
        if channel.payment.change_sat == 0:
            self._waiting[channel.outpoint] = channel
            begun = min(each.closing.begun_at for each in (channel, *members) if each.closing)
            if now - begun < context.batch_seconds and len(self._waiting) < context.batch_channels:
                return None
        members = [channel, *members][: context.batch_channels]
        if len(members) == 1:
            self._waiting.pop(channel.outpoint, None)
            return None
        batch = asyncio.create_task(self._sign_together(members))
        for member in members:
            self._waiting.pop(member.outpoint, None)
            self._batches[member.outpoint] = batch
        return batch

    async def _sign_together(self, members: Sequence[Channel]) -> dict[OutPoint, Settlement]:
        """Sign one settlement of the channels that are funded and could pay its rate alone; others settle alone."""
        context = self._context
        try:
            there = await context.chain.unspent([member.outpoint for member in members])
            together = [member for member in members if member.outpoint in there]
            if len(together) > 1:
                with signer_errors():
                    script = await destination_of(together[0], context.signer)
                together = fitting(together, script, conditions_of(context))
            if len(together) < 2:
                return {}
            settlement = await self._sign(together)
        except (ChainFailed, SigningFailed, SignerUnavailable, NotEconomical) as error:
            log.warning("batch not signed", channels=len(members), reason=str(error))
            return {}
        log.info("batch", channels=len(together), txid=settlement.txid[::-1].hex(), fee_sat=settlement.fee_sat)
        return {member.outpoint: settlement for member in together}
