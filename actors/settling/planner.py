"""The settlement planner: decides which closing channels are settled together, the fee, and when to raise it.

The planner tries, in this order:

1. Sign a settlement of the channel alone, at once, at the rate of the curve in `fees`. Drained channels may wait some
   time for other channels.
2. When the curve has risen enough, replace the settlement by one that pays more from the server's own output.
3. If that output is too small, let a coin of the reserve help to pay.
4. If a replacement had to pay for transactions that others attached to the settlement (pinning), beyond the budget, let
   a child of the server's own output pay instead (CPFP): miners include both because of the child's fee.

The actors of channels in one transaction call one by one; the first call signs for all of them. The planner holds no
state that a restart must keep: records hold the signed settlements, and the signer refuses to sign for a lower fee.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import structlog

from actors.context import Context
from actors.settling.signing import destination_of, fund_from_reserve, rate_of, rules_of, sign, sign_child
from paychan.chain.base import ChainFailed, Spend
from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import NotEconomical, PublishFailed, SignerUnavailable, SigningFailed
from paychan.protocol.fees import able_to_pay, is_beyond_share, is_due, is_outbid, is_urgent, most_sat, plan_child_fee
from paychan.protocol.settlement import (
    Reserve,
    Settlement,
    base_size,
    outpoints_of,
    received_sat,
    settlement_size,
    spends_by_server_branch,
)
from paychan.protocol.tx import signals_replaceability
from paychan.protocol.types import OutPoint, Sat
from paychan.signer_client.base import SignerAbsent, SignerRefused

log = structlog.get_logger("planner")

Read = Callable[[OutPoint], Awaitable[Channel | None]]


class SettlementPlanner:
    """Has settlements signed. Runs on the event loop, called by the actors of closing channels."""

    def __init__(self, context: Context, read: Read) -> None:
        self._context = context
        self._read = read
        self._waiting: dict[OutPoint, Channel] = {}
        self._batches: dict[OutPoint, asyncio.Task[dict[OutPoint, Settlement]]] = {}
        self._replacing: dict[bytes, asyncio.Task[Settlement | None]] = {}
        self._broadcast_since_block: tuple[str, set[bytes]] = ("", set())
        self._reserve_followed_in: int | None = None
        self._children: dict[bytes, Settlement] = {}
        self._kept = set[bytes]()
        self.pinned: dict[OutPoint, str] = {}
        """Settlements whose fee can't be raised, with the reason for the operator."""
        self.beyond_share: dict[OutPoint, str] = {}
        """Settlements past their deadline that cost more than the operator's share, with a text that tells how much."""

    # --- the first settlement ---------------------------------------------------------------------------------------

    async def first(self, channel: Channel) -> Settlement | None:
        """Sign a closing channel's first settlement; None while it waits for other channels.

        Raises:
            SignerUnavailable, SigningFailed, NotEconomical: the channel stays as it is.
        """
        batch = self._batches.pop(channel.outpoint, None) or self._form_batch(channel)
        if batch is not None:
            self._batches.pop(channel.outpoint, None)
            together = (await asyncio.shield(batch)).get(channel.outpoint)
            if together is not None:
                return together
        return None if channel.outpoint in self._waiting else await self._sign([channel])

    async def _sign(self, members: Sequence[Channel], least: Sat = Sat(0)) -> Settlement:
        """Sign, and raise an alarm if the fee exceeds the operator's share. Raises as `sign`."""
        settlement, claims = await sign(members, self._context, least), [member.claim for member in members]
        if is_beyond_share(claims, settlement.fee_sat, rules_of(members, self._context)):
            share, received = self._context.rules.fee_share_percent, received_sat(claims)
            text = (
                f"its deadline has passed: the fee is {settlement.fee_sat} sat of {received} sat, more than {share} %"
            )
            log.error("settlement costs more than the share", channel=str(members[0].outpoint), reason=text)
            self.beyond_share |= dict.fromkeys((member.outpoint for member in members), text)
        return settlement

    def _form_batch(self, channel: Channel) -> asyncio.Task[dict[OutPoint, Settlement]] | None:
        """Let a drained channel wait for others; settle them when the limit of time or number is reached.

        A channel with change never waits, but settles together with waiting channels. A channel near its deadline never
        waits.
        """
        context, now = self._context, self._context.paying_time()
        offers = channel.closing is not None and channel.closing.client_fee_sat > 0  # that fee pays only its settlement
        if not context.batch_seconds or channel.moves or offers or is_urgent(channel, context.rules, now):
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
        try:
            there = await self._context.chain.unspent([member.outpoint for member in members])
            together = [member for member in members if member.outpoint in there]
            if len(together) < 2:
                return {}
            together = await self._able_to_pay(together)
            if len(together) < 2:
                return {}
            settlement = await self._sign(together)
        except (ChainFailed, SigningFailed, SignerUnavailable, NotEconomical) as error:
            log.warning("batch not signed", channels=len(members), reason=str(error))
            return {}
        log.info("batch", channels=len(together), txid=settlement.txid[::-1].hex(), fee_sat=settlement.fee_sat)
        return {member.outpoint: settlement for member in together}

    # --- a higher fee -----------------------------------------------------------------------------------------------

    async def fee_bump(self, channel: Channel, spend: Spend | None, *, refused: bool = False) -> Settlement | None:
        """Sign a settlement that pays more than the last one, if the curve or the mempool requires it.

        `spend` spends the funding output in the node's mempool: it is the last settlement, an earlier one, or a refund.
        `refused`: the node has just refused the last one.

        Raises:
            SignerUnavailable, SigningFailed, PublishFailed: the last settlement stays.
        """
        paid = channel.closing.settlement if channel.closing else None
        if paid is None or (spend is not None and spend.confirmations):
            return None
        successor = await self._used_successor(channel)
        if successor is not None:
            if is_due(channel, paid, self._context.rules, self._context.paying_time(), self._context.chain_view.fees):
                why = (
                    f"payments depend on it; closing the channel at {successor.outpoint}, to which it moved, adds a fee"
                )
                await self._push_instead([channel], paid, why, successor)
            return None
        others = [] if len(outpoints_of(paid.transaction)) == 1 else await self._others(paid)
        adopted = next((other for record in others if (other := _better(record, channel, paid))), None)
        if adopted is not None:
            return adopted
        in_its_place = spend is not None and spend.txid != paid.txid
        if others and (refused or in_its_place) and not await self._is_whole(paid):
            return await self._replace([channel], paid, spend, dead=True)
        context = self._context
        if not in_its_place and not is_due(
            channel, paid, context.rules, context.paying_time(), context.chain_view.fees
        ):
            return None
        if spend is not None and not in_its_place and not self.may_replace(paid):
            why = "it does not signal replaceability, so the node does not replace it"
            await self._push_instead(others or [channel], paid, why)
            return None
        task = self._replacing.get(paid.txid)
        if task is None:
            task = self._replacing[paid.txid] = asyncio.create_task(self._replace_for_all(channel, paid, spend, others))
            task.add_done_callback(lambda _: self._replacing.pop(paid.txid, None))
        better = await asyncio.shield(task)  # without this channel, if its funding seems gone
        return better if better is not None and channel.outpoint in outpoints_of(better.transaction) else None

    async def _replace_for_all(
        self, channel: Channel, paid: Settlement, spend: Spend | None, others: Sequence[Channel]
    ) -> Settlement | None:
        members = await self._able_to_pay(await self._members(channel, paid, others))
        alone = channel.outpoint not in {member.outpoint for member in members}
        return await self._replace([channel] if alone else members, paid, spend)

    async def _able_to_pay(self, members: list[Channel]) -> list[Channel]:
        """Choose the members that could each pay the common rate alone."""
        if len(members) < 2:
            return members
        rate, script = rate_of(members, self._context), await destination_of(members[0], self._context)
        return able_to_pay(members, script, rules_of(members, self._context), rate)

    async def _replace(
        self, members: Sequence[Channel], paid: Settlement, spend: Spend | None, *, dead: bool = False
    ) -> Settlement | None:
        """Sign a settlement of these channels that replaces the last one, and whatever else spends their outputs.

        `dead`: the last one can't confirm any more, so the new one may have a lower rate.
        """
        rate, claims = rate_of(members, self._context), [member.claim for member in members]
        script = await destination_of(members[0], self._context)
        whole = len(members) == len(outpoints_of(paid.transaction))
        size = paid.size if whole else settlement_size(claims, script)
        most = most_sat(claims, size, rules_of(members, self._context), script)
        least, wanted = await self._least_fee(paid, size, spend), Sat(min(rate * size, most))
        if wanted < least:
            in_place = spend is not None and spend.txid == paid.txid
            if whole and in_place and await self._push(members, paid, rate):
                return None
            if least > most:
                if not in_place or least > paid.fee_sat + size * self._context.chain_view.fees.increment_sat_per_vb:
                    self._pin(members[0], f"its replacement costs at least {least} sat, the budget is {most} sat")
                return None  # without the alarm: no transaction depends on it, and it pays its whole budget
        better = None
        try:
            if max(wanted, least) > paid.fee_sat or not whole:
                lowest = least if dead or not whole else Sat(max(least, paid.fee_sat + 1))
                better = await self._sign(members, lowest)
            elif rate * size > most:  # the server's own output can't pay more
                better = await fund_from_reserve(members, rate, self._context, least)
        except SigningFailed as error:
            self._pin(members[0], f"the signer does not let it be replaced: {error}")
            raise
        self.pinned.pop(members[0].outpoint, None)
        return better if better is not None and (dead or better.is_dearer_than(paid)) else None

    async def _is_whole(self, paid: Settlement) -> bool:
        """Say whether a settlement of several inputs can still confirm: no refund or block spends one of them."""
        chain, outpoints = self._context.chain, outpoints_of(paid.transaction)
        try:
            there = await chain.unspent(outpoints)
            for outpoint in outpoints:
                spend = None if outpoint in there else await chain.spender(outpoint)
                if outpoint in there or (spend is not None and spend.txid == paid.txid):
                    continue
                if spend is None or spend.confirmations:
                    return False
                if not spends_by_server_branch(await chain.transaction(spend.txid), outpoint):
                    return False
        except ChainFailed as error:
            raise PublishFailed(reason=str(error)) from error
        return True

    async def _least_fee(self, paid: Settlement, size: int, spend: Spend | None) -> Sat:
        """Lowest fee of a replacement: the fees of everything it evicts, plus its own relay (BIP125 rules 3 and 4)."""
        if spend is None:
            return Sat(0)
        try:
            cost = await self._context.chain.replacement_cost(spend.txid)
            if cost is None:
                return Sat(0)
            if spend.txid != paid.txid:  # the spend may be smaller: the new rate must exceed its rate, too
                its_size = base_size(await self._context.chain.transaction(spend.txid))
                cost = Sat(max(cost, cost * size // its_size + 1))
        except ChainFailed as error:
            raise PublishFailed(reason=str(error)) from error
        return Sat(cost + size * self._context.chain_view.fees.increment_sat_per_vb)

    async def _others(self, paid: Settlement) -> list[Channel]:
        """Return the readable records of the channels that a settlement spends, in the order of its inputs."""
        return [
            record for outpoint in outpoints_of(paid.transaction) if (record := await self._read(outpoint)) is not None
        ]

    async def _members(self, channel: Channel, paid: Settlement, others: Sequence[Channel]) -> list[Channel]:
        """Return the channels of the next settlement: those of the last one whose funding has no confirmed spend."""
        members = [other for other in others if _has(other, paid)]
        try:
            unspent = await self._context.chain.unspent([member.outpoint for member in members])
            spends = [
                None if member.outpoint in unspent else await self._context.chain.spender(member.outpoint)
                for member in members
            ]
        except ChainFailed as error:
            raise PublishFailed(reason=str(error)) from error
        there = [
            member
            for member, spend in zip(members, spends, strict=True)
            if member.outpoint in unspent or (spend and not spend.confirmations)
        ]
        return there if channel.outpoint in {member.outpoint for member in there} else [channel]

    # --- settlements that are not replaced --------------------------------------------------------------------------

    def may_replace(self, settlement: Settlement) -> bool:
        """Say whether the node would replace this settlement of the server's in its mempool."""
        if signals_replaceability(settlement.transaction):
            return True
        return self._context.chain.capabilities.full_rbf is not False and settlement.txid not in self._kept

    def note_kept(self, settlement: Settlement, reason: str) -> None:
        """Note that the node has just refused to replace a settlement: until the next block, only children add fees."""
        log.warning("the node does not replace the settlement", txid=settlement.txid[::-1].hex(), reason=reason)
        self._kept.add(settlement.txid)

    async def _used_successor(self, channel: Channel) -> Channel | None:
        """Find the channel that continues at a withdrawal that has confirmed once, if that channel is used.

        Another version of the withdrawal would have another txid, and all payments of the continued channel would lose
        the output that they spend. So after a reorg the same version is broadcast again, and a child raises its fee
        (CPFP).
        """
        if not channel.moves or channel.closing is None or not channel.closing.spent_by:
            return None
        successor = await self._context.store.get(OutPoint(channel.closing.spent_by, 0))
        return successor if successor is not None and successor.is_used else None

    async def _push_by(self, successor: Channel | None, paid: Settlement) -> bool:
        """Broadcast a withdrawal with the settlement of the continued channel: a child that is signed already."""
        child = successor.closing.settlement if successor is not None and successor.closing else None
        if child is None:
            return False
        try:
            await self._context.chain.publish(paid.transaction, child.transaction)
        except ChainFailed as error:
            log.warning("no child raises the fee of the withdrawal", txid=paid.txid[::-1].hex(), reason=str(error))
            return False
        return True

    async def _push_instead(
        self, members: Sequence[Channel], paid: Settlement, why: str, successor: Channel | None = None
    ) -> None:
        """Raise the fee of a settlement by a child (CPFP) instead of a replacement, or raise an alarm."""
        if await self._push(members, paid, rate_of(members, self._context)) or await self._push_by(successor, paid):
            self.pinned.pop(members[0].outpoint, None)
        else:
            self._pin(members[0], f"{why}, and no child of the server's output can pay more")

    async def _push(self, members: Sequence[Channel], paid: Settlement, rate: int) -> bool:
        """Let a child of the server's output pay; return whether one is broadcast."""
        own_sat = Sat(sum(member.received_sat for member in members) - paid.fee_sat)
        fee = plan_child_fee(paid, own_sat, rate, rules_of(members, self._context))
        pushed = self._children.get(paid.txid)
        if pushed is not None and (fee is None or not is_outbid(pushed, fee // pushed.size)):
            with contextlib.suppress(ChainFailed):  # broadcast both again: the node may have evicted them
                await self._context.chain.publish(paid.transaction, pushed.transaction)
            return True
        if fee is None:
            return False
        try:
            child = await sign_child(members, paid, fee, self._context)
            await self._context.chain.publish(paid.transaction, child.transaction)
        except (SignerRefused, SignerAbsent, SigningFailed, SignerUnavailable, ChainFailed) as error:
            log.warning("no child can pay", channel=str(members[0].outpoint), reason=str(error))
            return False
        log.info("child pays", channel=str(members[0].outpoint), txid=child.txid[::-1].hex(), fee_sat=child.fee_sat)
        self._children[paid.txid] = child
        return True

    def _pin(self, channel: Channel, reason: str) -> None:
        if self.pinned.get(channel.outpoint) != reason:
            log.error("settlement is pinned", channel=str(channel.outpoint), reason=reason)
        self.pinned[channel.outpoint] = reason

    async def follow_reserve(self) -> None:
        """Have the chain follow the reserve, so that its coins are known when they are needed.

        Once is enough, until the chain backend loses its memory; then a scan finds the coins of before.
        """
        chain = self._context.chain
        if self._reserve_followed_in == chain.capabilities.memory:
            return
        with contextlib.suppress(ChainFailed, SignerAbsent, SignerRefused):
            reserve = Reserve(await self._context.signer.reserve_key())
            await chain.adopt(reserve, [coin.outpoint for coin in await chain.funding(reserve)])
            self._reserve_followed_in = chain.capabilities.memory

    # --- broadcasts -------------------------------------------------------------------------------------------------

    def may_rebroadcast(self, settlement: Settlement) -> bool:
        """Say, once after each block, whether to broadcast a settlement again."""
        tip = self._context.chain_view.tip
        if tip is not None and tip.block_hash != self._broadcast_since_block[0]:
            self._broadcast_since_block = tip.block_hash, set()
            self._kept.clear()
        new = settlement.txid not in self._broadcast_since_block[1]
        self.note_broadcast(settlement)
        return new

    def note_broadcast(self, settlement: Settlement) -> None:
        """Note that the settlement was broadcast since the last block."""
        self._broadcast_since_block[1].add(settlement.txid)


def _better(record: Channel, channel: Channel, paid: Settlement) -> Settlement | None:
    """Return the settlement that another channel of the same batch stores already, if it settles this channel too."""
    other = record.closing.settlement if record.closing else None
    if other is None or not other.is_dearer_than(paid) or channel.outpoint not in outpoints_of(other.transaction):
        return None
    return other


def _has(channel: Channel, settlement: Settlement) -> bool:
    """Say whether the channel is still closing, and its record stores this settlement."""
    stored = channel.closing.settlement if channel.closing else None
    return channel.state in (State.CLOSING, State.PUBLISHED) and stored is not None and stored.txid == settlement.txid
