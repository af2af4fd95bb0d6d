"""Settling from a backup: plans each settlement; on request, the running signer signs it, and the chain gets it.

This runs without server and store, because their machine may be lost. `settlement_plan.plan` decides, as for the
server; the reserve stays as it is, for without a store two settlements could choose the same coin. Every step may be
repeated: settled channels are recognised, and the signer signs the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence

import structlog

from actors.settling.backup_units import Outcome, Plan, Result, Unit, stored_settlement
from actors.settling.signing import destination_of, sign, sign_child
from paychan.chain.base import Chain, ChainFailed, Spend
from paychan.protocol.channel import Channel, View
from paychan.protocol.errors import NotEconomical
from paychan.protocol.fees import ChainFees, Shortfall
from paychan.protocol.settlement import Settlement, base_size, spends_by_server_branch
from paychan.protocol.settlement_plan import (
    ChildPays,
    Conditions,
    Pinned,
    Sign,
    Spends,
    Unconfirmed,
    fitting,
    plan,
    plan_child,
)
from paychan.protocol.tx import signals_replaceability
from paychan.protocol.types import Sat, UnixTime
from paychan.signer_client.base import Signer, SignerRefused

log = structlog.get_logger("offline")

_AT_ONCE = 32
"""Channels settled concurrently; the signer and the node handle their requests one by one anyway."""

_PAGE = 1000
"""Scripts that the chain is asked to watch in one call."""

_FUNDED_BEFORE_SECONDS = 14 * 86_400
"""Assumed largest age of a funding output when its channel opens; needed only if the node's wallet was lost."""


class Settler:
    """Settles units. `chain` shows what was settled since the backup; None: it is not known, and nothing is broadcast.

    Without `signs` nothing is signed: the signer would remember it, and the server would close the channels. Without
    `publishes` nothing is broadcast.
    """

    def __init__(
        self,
        signer: Signer,
        chain: Chain | None,
        view: View,
        fees: ChainFees,
        fee_rate: int | None,
        *,
        signs: bool = True,
        publishes: bool = True,
    ) -> None:
        self._signer = signer
        self._chain = chain
        self._signs, self._publishes = signs, publishes and chain is not None
        self._conditions = Conditions(view.rules, view.now, fees, fee_rate, follows_curve=False)

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
        left = list[Channel]()
        for member in unit.members:
            result = await self._look(member)
            is_final = result is not None and result.outcome is not Outcome.WAITING
            if result is not None and (is_final or not self._conditions.requested_sat_per_vb):
                results.append(result)
            else:
                left.append(member)
        whole = len(left) == len(unit.members) and await self._stays_together(unit)
        for rest in (unit,) if whole else [Unit((member,)) for member in left]:
            results += await self._plan_and_publish(rest)
        return results

    async def _look(self, channel: Channel) -> Result | None:
        """Return the channel's result so far, if a transaction other than an unconfirmed refund spends its output."""
        spend = await self._spend(channel)
        if self._chain is None or spend is None:
            return None
        if spends_by_server_branch(await self._chain.transaction(spend.txid), channel.outpoint):
            outcome, stored = Outcome.SETTLED if spend.confirmations else Outcome.WAITING, stored_settlement(channel)
            settlement = stored if stored and stored.txid == spend.txid else None
            return Result(channel, outcome, settlement, spend.txid, confirmations=spend.confirmations)
        if not spend.confirmations:
            return None
        return Result(channel, Outcome.REFUNDED, txid=spend.txid, confirmations=spend.confirmations)

    async def _spend(self, channel: Channel) -> Spend | None:
        return await self._chain.spender(channel.outpoint) if self._chain else None

    async def _stays_together(self, unit: Unit) -> bool:
        """Return whether the signed settlement pays the rate, or all members could pay their share of it alone."""
        members, signed = unit.members, unit.signed
        if len(members) < 2 or signed is None or not any(self._conditions.is_due(each, signed) for each in members):
            return True
        return len(fitting(members, await destination_of(members[0], self._signer), self._conditions)) == len(members)

    # --- the plan, and its attempts ---------------------------------------------------------------------------------

    async def _plan_and_publish(self, unit: Unit) -> list[Result]:
        try:
            return await self._carry_out(unit, await self._spends(unit))
        except NotEconomical as error:
            return [Result(member, Outcome.TOO_SMALL, reason=str(error)) for member in unit.members]
        except SignerRefused as error:
            return [Result(member, Outcome.REFUSED, reason=str(error)) for member in unit.members]

    async def _spends(self, unit: Unit) -> Spends:
        """Gather the facts: the signed settlement, and what the mempool has of the members' outputs."""
        mempool = dict[bytes, Unconfirmed]()
        for member in unit.members:
            spend = await self._spend(member)
            if self._chain is not None and spend is not None and not spend.confirmations:
                cost = await self._chain.replacement_cost(spend.txid)
                size = base_size(await self._chain.transaction(spend.txid))
                mempool[spend.txid] = Unconfirmed(spend.txid, cost or Sat(0), size)
        signals = unit.signed is not None and signals_replaceability(unit.signed.transaction)
        may_replace = signals or self._chain is None or self._chain.capabilities.full_rbf is not False
        return Spends(unit.signed, tuple(mempool.values()), None, may_replace, is_built_upon=unit.is_built_upon)

    async def _carry_out(self, unit: Unit, spends: Spends) -> list[Result]:
        """Make the attempts until one succeeds. Raises `NotEconomical`, `SignerRefused`: there is no settlement."""
        reason = ""
        script = await destination_of(unit.members[0], self._signer)
        for attempt in plan(unit.members, script, spends, self._conditions):
            match attempt:
                case Sign() if not self._signs:
                    planned = Plan(unit.members[0].outpoint, attempt.fee_sat, script)
                    return [Result(member, Outcome.PLANNED, plan=planned) for member in unit.members]
                case Sign():
                    return await self._broadcast(unit, await self._sign(attempt, unit))
                case ChildPays():
                    if unit.signed is not None and await self._child_pays(attempt, unit.members, unit.signed):
                        return _results(unit, Outcome.PUBLISHED, unit.signed)
                case Shortfall(received_sat=got, needed_sat=need):
                    if unit.signed is None:
                        raise NotEconomical(got_sat=got, need_sat=need)
                case Pinned():
                    reason = attempt.reason
                case _:
                    pass  # the last settlement stays
        return await self._broadcast(unit, unit.signed, reason) if unit.signed is not None else []

    async def _sign(self, attempt: Sign, unit: Unit) -> Settlement:
        """Sign for the fee of the attempt, or for what the signer allows; a signed settlement that pays more stays."""
        script = await destination_of(unit.members[0], self._signer)
        transactions = self._chain.transaction if self._chain else None
        try:
            dearer = await sign(attempt, unit.members, script, self._conditions, self._signer, transactions)
        except SignerRefused as error:
            if unit.signed is None:
                raise
            log.info("the settlement that was signed stays", txid=unit.signed.txid[::-1].hex(), reason=str(error))
            return unit.signed
        return dearer if unit.signed is None or dearer.is_dearer_than(unit.signed) else unit.signed

    async def _broadcast(self, unit: Unit, settlement: Settlement, pinned: str = "") -> list[Result]:
        """Broadcast a settlement after the withdrawal that it depends on, unless the mempool has it already."""
        looks = [await self._look(member) for member in unit.members]
        existing = [result for result in looks if result is not None and result.txid == settlement.txid]
        if len(existing) == len(looks):
            return existing
        if self._chain is None or not self._publishes:
            return _results(unit, Outcome.SIGNED, settlement)
        if unit.parent is not None:
            with contextlib.suppress(ChainFailed):
                await self._chain.publish(unit.parent.transaction)
        try:
            await self._chain.publish(settlement.transaction)
        except ChainFailed as error:
            for child in plan_child(unit.members, unit.signed, None, self._conditions) if unit.signed else ():
                if unit.signed is not None and await self._child_pays(child, unit.members, unit.signed):
                    return _results(unit, Outcome.PUBLISHED, unit.signed)
            reason = f"{pinned}: {error}" if pinned else str(error)
            refused = _results(unit, Outcome.REFUSED, settlement, reason)  # unless another settlement is there
            return [(await self._look(result.channel)) or result for result in refused]
        return _results(unit, Outcome.PUBLISHED, settlement)

    async def _child_pays(self, attempt: ChildPays, members: Sequence[Channel], paid: Settlement) -> bool:
        """Let a child of the server's output pay for a settlement that can't be replaced; return whether it does."""
        if self._chain is None or not self._publishes:
            return False
        try:
            child = await sign_child(attempt, members, paid, self._signer)
            await self._chain.publish(paid.transaction, child.transaction)
        except (SignerRefused, ChainFailed) as error:
            log.info("no child can pay", channel=str(members[0].outpoint), reason=str(error))
            return False
        return True


def _results(unit: Unit, outcome: Outcome, settlement: Settlement, reason: str = "") -> list[Result]:
    return [Result(member, outcome, settlement, settlement.txid, reason) for member in unit.members]
