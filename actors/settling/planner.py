"""The server's settlement planner: gathers the facts, has `settlement_plan.plan` decide, and carries the attempts out.

The actors of channels in one transaction call one by one; the first call signs for all of them. The planner holds no
state that a restart must keep: records hold the signed settlements, and the signer refuses to sign for a lower fee.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import structlog

from actors.context import Context
from actors.settling.batches import Batches
from actors.settling.broadcasts import Broadcasts
from actors.settling.facts import Read, SettlementFacts
from actors.settling.signing import conditions_of, destination_of, newer_claim, sign, sign_child, signer_errors
from paychan.chain.base import ChainFailed, Spend
from paychan.protocol.channel import Channel
from paychan.protocol.errors import NotEconomical, SigningFailed
from paychan.protocol.fees import Shortfall, is_beyond_share
from paychan.protocol.settlement import (
    Coin,
    Reserve,
    Settlement,
    outpoints_of,
    received_sat,
)
from paychan.protocol.settlement_plan import (
    Attempt,
    ChildPays,
    FundFromReserve,
    Pinned,
    Sign,
    Spends,
    SuccessorPays,
    Wait,
    choose_coin,
    dearer_elsewhere,
    fitting,
    plan,
    plan_signing,
)
from paychan.protocol.types import OutPoint
from paychan.signer_client.base import SignerAbsent, SignerRefused

log = structlog.get_logger("planner")


class SettlementPlanner:
    """Has settlements signed. Runs on the event loop, called by the actors of closing channels."""

    def __init__(self, context: Context, read: Read) -> None:
        self._context = context
        self._facts = SettlementFacts(context, read)
        self._batches = Batches(context, self.sign)
        self._replacing: dict[bytes, asyncio.Task[Settlement | None]] = {}
        self._reserve_followed_in: int | None = None
        self._children: dict[bytes, Settlement] = {}
        self.broadcasts = Broadcasts(context)
        self.pinned: dict[OutPoint, str] = {}
        """Settlements whose fee can't be raised, with the reason for the operator."""
        self.beyond_share: dict[OutPoint, str] = {}
        """Settlements past their deadline that cost more than the operator's share, with a text that tells how much."""

    async def first(self, channel: Channel) -> Settlement | None:
        """Sign a closing channel's first settlement; None while it waits for other channels.

        Raises:
            SignerUnavailable, SigningFailed, NotEconomical: the channel stays as it is.
        """
        together = await self._batches.settle(channel)
        if together is not None:
            return together
        return None if self._batches.waits(channel) else await self.sign([channel])

    async def sign(self, members: Sequence[Channel]) -> Settlement:
        """Sign one settlement of these channels, at their rate.

        Raises:
            SignerUnavailable, SigningFailed: the signer is away, or refuses.
            NotEconomical: the channels received less than the cheapest settlement costs.
            Newer: the signer has signed a newer claim of the single channel.
        """
        attempts = plan_signing(members, await self._destination(members), conditions_of(self._context))
        with signer_errors():
            settlement = await self._carry_out(attempts, members, Spends())
        if settlement is None:
            raise SigningFailed(reason="nothing to sign")
        return settlement

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
        others = [] if len(outpoints_of(paid.transaction)) == 1 else await self._facts.others(paid)
        stored = dearer_elsewhere(channel, paid, others)
        if stored is not None:
            return stored
        is_due = conditions_of(self._context).is_due(channel, paid)
        is_displaced = spend is not None and spend.txid != paid.txid
        if others and (refused or is_displaced) and not await self._facts.is_whole(paid):
            return await self._replace([channel], paid, spend, is_void=True)
        if not (is_due or is_displaced):
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
        is_in_place = spend is not None and spend.txid == paid.txid
        if is_in_place and not self.broadcasts.may_replace(paid):
            return await self._replace(others or [channel], paid, spend)
        members = await self._facts.members(channel, paid, others) if others else [channel]
        if len(members) > 1:
            members = fitting(members, await self._destination(members), conditions_of(self._context))
        alone = channel.outpoint not in {member.outpoint for member in members}
        return await self._replace([channel] if alone else members, paid, spend)

    async def _replace(
        self, members: Sequence[Channel], paid: Settlement, spend: Spend | None, *, is_void: bool = False
    ) -> Settlement | None:
        """Carry out what the plan says about the last settlement; return the one that replaces it, if there is one."""
        successor = await self._facts.used_successor(members[0])
        spends = Spends(
            paid=paid,
            mempool=() if spend is None else (await self._facts.unconfirmed(spend, paid),),
            child=self._children.get(paid.txid),
            is_replaceable=self.broadcasts.may_replace(paid),
            is_void=is_void,
            is_built_upon=successor is not None,
        )
        attempts = plan(members, await self._destination(members), spends, conditions_of(self._context))
        try:
            with signer_errors():
                better = await self._carry_out(attempts, members, spends, successor)
        except SigningFailed as error:
            self._pin(members[0], f"the signer does not let it be replaced: {error}")
            raise
        return better if better is not None and (is_void or better.is_dearer_than(paid)) else None

    async def _destination(self, members: Sequence[Channel]) -> bytes:
        with signer_errors():
            return await destination_of(members[0], self._context.signer)

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def _carry_out(
        self, attempts: Sequence[Attempt], members: Sequence[Channel], spends: Spends, successor: Channel | None = None
    ) -> Settlement | None:
        """Make the attempts until one succeeds; return the settlement that is signed, if any. Raises as `sign`."""
        for attempt in attempts:
            result = await self._make(attempt, members, spends, successor)
            if result is False:
                continue
            if not isinstance(attempt, Pinned):
                self.pinned.pop(members[0].outpoint, None)
            if isinstance(result, Settlement):
                self._alarm_beyond_share(result, members)
                return result
            return None
        return None

    async def _make(
        self, attempt: Attempt, members: Sequence[Channel], spends: Spends, successor: Channel | None
    ) -> Settlement | bool:
        """Make one attempt; return the settlement that is signed, or whether the attempt succeeded without one."""
        match attempt:
            case Sign():
                return await self._sign(attempt, members)
            case FundFromReserve():
                return await self._fund_from_reserve(attempt, members) or False
            case ChildPays():
                return await self._child_pays(attempt, members, spends)
            case SuccessorPays():
                return await self._successor_pays(successor, spends)
            case Wait():
                return True
            case Pinned(reason=reason):
                self._pin(members[0], reason)
                return True
            case Shortfall(received_sat=got, needed_sat=need):
                raise NotEconomical(got_sat=got, need_sat=need)

    async def _sign(self, attempt: Sign, members: Sequence[Channel], reserve: Reserve | None = None) -> Settlement:
        context = self._context
        script = reserve.funding_script if reserve else await destination_of(members[0], context.signer)
        try:
            return await sign(
                attempt, members, script, conditions_of(context), context.signer, context.chain.transaction, reserve
            )
        except SignerRefused as error:
            newer = await newer_claim(error, members, context.signer)
            if newer is None:
                raise
            raise newer from error

    async def _fund_from_reserve(self, attempt: FundFromReserve, members: Sequence[Channel]) -> Settlement | None:
        key = await self._context.signer.reserve_key()
        try:
            found = await self._context.chain.funding(Reserve(key))
        except ChainFailed:
            return None
        coins = [Coin(coin.outpoint, coin.value_sat) for coin in found if coin.confirmations]
        chosen = choose_coin(members, key, coins, attempt, conditions_of(self._context))
        return None if chosen is None else await self._sign(chosen[1], members, chosen[0])

    async def _child_pays(self, attempt: ChildPays, members: Sequence[Channel], spends: Spends) -> bool:
        """Broadcast the settlement with a child; one that was broadcast is repeated, as the node may have evicted it."""
        paid, publish, channel = spends.paid, self._context.chain.publish, str(members[0].outpoint)
        if paid is None:
            return False
        if spends.child is not None and spends.child.fee_sat == attempt.fee_sat:
            with contextlib.suppress(ChainFailed):
                await publish(paid.transaction, spends.child.transaction)
            return True
        try:
            child = await sign_child(attempt, members, paid, self._context.signer)
            await publish(paid.transaction, child.transaction)
        except (SignerRefused, SignerAbsent, ChainFailed) as error:
            log.warning("no child can pay", channel=channel, reason=str(error))
            return False
        log.info("child pays", channel=channel, txid=child.txid[::-1].hex(), fee_sat=child.fee_sat)
        self._children[paid.txid] = child
        return True

    async def _successor_pays(self, successor: Channel | None, spends: Spends) -> bool:
        """Broadcast a withdrawal with the settlement of the continued channel: a child that is signed already."""
        child = successor.closing.settlement if successor is not None and successor.closing else None
        if child is None or spends.paid is None:
            return False
        try:
            await self._context.chain.publish(spends.paid.transaction, child.transaction)
        except ChainFailed as error:
            log.warning(
                "no child raises the fee of the withdrawal", txid=spends.paid.txid[::-1].hex(), reason=str(error)
            )
            return False
        return True

    def _pin(self, channel: Channel, reason: str) -> None:
        if self.pinned.get(channel.outpoint) != reason:
            log.error("settlement is pinned", channel=str(channel.outpoint), reason=reason)
        self.pinned[channel.outpoint] = reason

    def _alarm_beyond_share(self, settlement: Settlement, members: Sequence[Channel]) -> None:
        """Raise an alarm if the fee exceeds the operator's share."""
        rules, claims = conditions_of(self._context).rules_for(members), [member.claim for member in members]
        if is_beyond_share(claims, settlement.fee_sat, rules):
            paid = f"{settlement.fee_sat} sat of {received_sat(claims)} sat"
            text = f"its deadline has passed: the fee is {paid}, more than {rules.fee_share_percent} %"
            log.error("settlement costs more than the share", channel=str(members[0].outpoint), reason=text)
            self.beyond_share |= dict.fromkeys((member.outpoint for member in members), text)

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
