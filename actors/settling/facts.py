"""The facts by which a settlement is planned again: records of its members, and what the chain has of their outputs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from actors.context import Context
from paychan.chain.base import ChainFailed, Spend
from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import PublishFailed
from paychan.protocol.settlement import Settlement, base_size, outpoints_of, spends_by_server_branch
from paychan.protocol.settlement_plan import Unconfirmed
from paychan.protocol.types import OutPoint

Read = Callable[[OutPoint], Awaitable[Channel | None]]


class SettlementFacts:
    """Reads records and chain. Methods that read the chain raise `PublishFailed` if it does not answer."""

    def __init__(self, context: Context, read: Read) -> None:
        self._context = context
        self._read = read

    async def is_whole(self, paid: Settlement) -> bool:
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

    async def unconfirmed(self, spend: Spend, paid: Settlement) -> Unconfirmed:
        """Read the cost and the size of the transaction in the mempool."""
        try:
            cost = await self._context.chain.replacement_cost(spend.txid)
            if cost is None:
                return Unconfirmed(spend.txid)
            is_paid = spend.txid == paid.txid
            size = paid.size if is_paid else base_size(await self._context.chain.transaction(spend.txid))
        except ChainFailed as error:
            raise PublishFailed(reason=str(error)) from error
        return Unconfirmed(spend.txid, cost, size)

    async def others(self, paid: Settlement) -> list[Channel]:
        """Return the readable records of the channels that a settlement spends, in the order of its inputs."""
        return [
            record for outpoint in outpoints_of(paid.transaction) if (record := await self._read(outpoint)) is not None
        ]

    async def members(self, channel: Channel, paid: Settlement, others: Sequence[Channel]) -> list[Channel]:
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

    async def used_successor(self, channel: Channel) -> Channel | None:
        """Find the channel that continues at a withdrawal that has confirmed once, if that channel is used.

        Another version of the withdrawal would have another txid, and all payments of the continued channel would lose
        the output that they spend. So after a reorg the same version is broadcast again, and a child raises its fee
        (CPFP).
        """
        if not channel.moves or channel.closing is None or not channel.closing.spent_by:
            return None
        successor = await self._context.store.get(OutPoint(channel.closing.spent_by, 0))
        return successor if successor is not None and successor.is_used else None


def _has(channel: Channel, settlement: Settlement) -> bool:
    """Say whether the channel is still closing, and its record stores this settlement."""
    stored = channel.closing.settlement if channel.closing else None
    return channel.state in (State.CLOSING, State.PUBLISHED) and stored is not None and stored.txid == settlement.txid
