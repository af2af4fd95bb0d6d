"""The contract `paychan.chain.base.Chain` for fees, replacements and packages, in quiet times and in a fee spike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paychan.chain.base import Chain, ChainFailed, Spend
from paychan.protocol.fees import ChainFees
from paychan.protocol.settlement import Settlement
from paychan.protocol.types import OutPoint, Sat
from tests.contract.chains import World, asked, eventually, funded, lift, refund, settle
from tests.lib.crowdedmempool import CrowdedMempool
from tests.lib.node import Node

FLOOR_SAT_PER_VB = 50
POOR_SAT, LIFTING_SAT = 400, 40_000
"""Fees of a settlement that the crowded mempool refuses, and of a child that pays for both."""


@pytest.fixture
def crowd(node: Node) -> Iterator[CrowdedMempool]:
    crowd = CrowdedMempool(node)
    yield crowd
    crowd.empty()


class TestFees:
    async def test_quiet(self, chain: Chain) -> None:
        """A chain without data for an estimate has none, and requires the minimum."""
        assert await chain.fees() == ChainFees(None, floor_sat_per_vb=1, increment_sat_per_vb=1)

    async def test_settings_of_the_node(self, chain: Chain, node: Node) -> None:
        """Floor and increment are the node's settings, rounded up."""
        node.stop()
        node.start("-minrelaytxfee=0.00003141", "-incrementalrelayfee=0.00001001")
        await eventually(lambda: asked(least, chain), (4, 2))
        node.stop()
        node.start()
        await eventually(lambda: asked(least, chain), (1, 1))

    async def test_spike(self, chain: Chain, crowd: CrowdedMempool) -> None:
        """The floor rises with the rates that a full mempool evicted, and falls again."""
        for floor in (20, 300):
            crowd.fill(floor)
            await eventually(lambda: least(chain), (floor, 1))
        crowd.empty()
        await eventually(lambda: least(chain), (1, 1))


class TestReplacement:
    async def test_cost(self, world: World, chain: Chain, node: Node) -> None:
        """A transaction in the mempool costs its fee and those of its descendants, if the backend can tell."""
        payer, funding = await funded(chain, node, "replacement cost")
        settlement = settle(payer, funding)
        child = lift(settlement, 3_000)
        assert await chain.replacement_cost(settlement.txid) is None
        await chain.publish(settlement.transaction)
        assert await chain.replacement_cost(settlement.txid) == known(world, 2_000)
        await chain.publish(settlement.transaction, child.transaction)
        assert await chain.replacement_cost(settlement.txid) == known(world, 5_000)
        assert await chain.replacement_cost(child.txid) == known(world, 3_000)
        dearer = settle(payer, funding, fee_sat=5_000)
        with pytest.raises(ChainFailed, match=r"\w"):
            await chain.publish(dearer.transaction)
        dearer = settle(payer, funding, fee_sat=5_000 + settlement.size + 1)
        await chain.publish(dearer.transaction)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(dearer.txid, 0))
        assert await chain.replacement_cost(settlement.txid) is None
        node.mine()
        assert await chain.replacement_cost(dearer.txid) is None


class TestPackages:
    async def test_again_and_again(self, chain: Chain, node: Node) -> None:
        """A pair is broadcast when new, when both are in the mempool, and when both are confirmed."""
        payer, funding = await funded(chain, node, "pair")
        settlement = settle(payer, funding)
        child = lift(settlement, 3_000)
        for _ in range(2):
            await chain.publish(settlement.transaction, child.transaction)
            assert waiting(node) == {settlement.txid, child.txid}
        node.mine()
        await chain.publish(settlement.transaction, child.transaction)
        assert waiting(node) == set()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 1))

    async def test_child_for_a_waiting_parent(self, chain: Chain, node: Node) -> None:
        """A child is broadcast for a settlement in the mempool, and replaced by one with a higher fee."""
        payer, funding = await funded(chain, node, "waiting parent")
        settlement = settle(payer, funding)
        await chain.publish(settlement.transaction)
        for fee_sat in (3_000, 6_000):
            child = lift(settlement, fee_sat)
            await chain.publish(settlement.transaction, child.transaction)
            assert waiting(node) == {settlement.txid, child.txid}
        node.mine()

    async def test_child_for_a_confirmed_parent(self, chain: Chain, node: Node) -> None:
        """A child whose parent was confirmed meanwhile is broadcast alone."""
        payer, funding = await funded(chain, node, "confirmed parent")
        settlement = settle(payer, funding)
        child = lift(settlement, 3_000)
        await chain.publish(settlement.transaction)
        node.mine()
        for _ in range(2):
            await chain.publish(settlement.transaction, child.transaction)
            assert waiting(node) == {child.txid}
        node.mine()

    async def test_child_pays_for_both(self, chain: Chain, node: Node, crowd: CrowdedMempool) -> None:
        """A settlement that the mempool would refuse enters it with a child that pays for both, and only with it."""
        payer, funding = await funded(chain, node, "poor")
        settlement = settle(payer, funding, fee_sat=POOR_SAT)
        crowd.fill(FLOOR_SAT_PER_VB)
        for child in (b"", lift(settlement, POOR_SAT).transaction):
            with pytest.raises(ChainFailed, match=r"\w"):
                await chain.publish(settlement.transaction, child)
        await eventually(lambda: chain.spender(funding.outpoint), None)
        child = lift(settlement, LIFTING_SAT)
        for _ in range(2):
            await chain.publish(settlement.transaction, child.transaction)
            assert waiting(node) >= {settlement.txid, child.txid}
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 0))
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 1))

    async def test_pair_for_a_pair(self, chain: Chain, node: Node, crowd: CrowdedMempool) -> None:
        """A pair replaces another one if it pays more in total, although the settlement alone would be refused."""
        payer, funding = await funded(chain, node, "pair for pair")
        crowd.fill(FLOOR_SAT_PER_VB)
        old, new = (settle(payer, funding, fee_sat=fee_sat) for fee_sat in (POOR_SAT, POOR_SAT + 100))
        await chain.publish(old.transaction, lift(old, LIFTING_SAT).transaction)
        with pytest.raises(ChainFailed, match=r"\w"):
            await chain.publish(new.transaction, lift(new, LIFTING_SAT).transaction)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(old.txid, 0))
        await chain.publish(new.transaction, lift(new, 2 * LIFTING_SAT).transaction)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(new.txid, 0))

    async def test_evicted(self, chain: Chain, node: Node, crowd: CrowdedMempool) -> None:
        """A settlement that a spike evicted from the mempool returns with a child."""
        payer, funding = await funded(chain, node, "evicted")
        settlement = settle(payer, funding)
        await chain.publish(settlement.transaction)
        crowd.fill(FLOOR_SAT_PER_VB)
        await eventually(lambda: chain.spender(funding.outpoint), None)
        await chain.publish(settlement.transaction, lift(settlement, LIFTING_SAT).transaction)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 0))

    async def test_child_refused(self, chain: Chain, node: Node) -> None:
        """A refused child is an error, although its settlement was broadcast."""
        payer, funding = await funded(chain, node, "bad child")
        settlement = settle(payer, funding)
        with pytest.raises(ChainFailed, match=r"\w"):
            await chain.publish(settlement.transaction, unsigned(lift(settlement, 3_000)))
        assert waiting(node) == {settlement.txid}
        node.mine()
        with pytest.raises(ChainFailed, match=r"\w"):
            await chain.publish(settlement.transaction, unsigned(lift(settlement, 3_000)))
        assert waiting(node) == set()

    async def test_too_late(self, chain: Chain, node: Node) -> None:
        """A pair whose funding another transaction has spent is refused, in the mempool and in the chain."""
        payer, funding = await funded(chain, node, "pair too late")
        settlement = settle(payer, funding)
        node.send_raw(refund(payer, funding).transaction)
        for _ in range(2):
            with pytest.raises(ChainFailed, match=r"\w"):
                await chain.publish(settlement.transaction, lift(settlement, 3_000).transaction)
            node.mine()


async def least(chain: Chain) -> tuple[int, int]:
    """Return floor and increment."""
    fees = await chain.fees()
    return fees.floor_sat_per_vb, fees.increment_sat_per_vb


def known(world: World, sat: int) -> Sat | None:
    return Sat(sat) if world.tells_replacement_cost else None


def unsigned(child: Settlement) -> bytes:
    """Return the child with an invalid signature."""
    return child.transaction.replace(child.transaction[43:60], bytes(17))


def waiting(node: Node) -> set[bytes]:
    return {OutPoint.parse(txid, 0).txid for txid in node.rpc("getrawmempool")}
