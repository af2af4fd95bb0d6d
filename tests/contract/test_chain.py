"""The contract `paychan.chain.base.Chain`, checked for every backend with real channels on a real chain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from functools import partial
from typing import Any

import pytest

from paychan.chain.base import Chain, ChainFailed, Funding, Spend
from paychan.chain.bitcoind.chain import BitcoindChain
from paychan.client.coins import proven_value
from paychan.protocol.settlement import Reserve
from paychan.protocol.tx import without_witness
from paychan.protocol.types import OutPoint, Sat, UnixTime
from tests.contract.chains import (
    DAY_SECONDS,
    FUNDING_SAT,
    OLD,
    PAST,
    PATIENCE_SECONDS,
    World,
    address,
    asked,
    eventually,
    funded,
    opened,
    refund,
    reserve_of,
    settle,
    tip_hash,
)
from tests.lib.channels import Payer, private_key
from tests.lib.node import Node


class TestFunding:
    async def test_mempool_and_depth(self, chain: Chain, node: Node) -> None:
        """An output is listed with its exact value at 0 confirmations in the mempool, and one more with every block."""
        payer, funding = await funded(chain, node, "depth", confirmations=0)
        for confirmations in (1, 2, 3):
            node.mine()
            deeper = Funding(funding.outpoint, FUNDING_SAT, confirmations)
            await eventually(partial(chain.funding, payer.terms), (deeper,))
            assert await chain.unspent([funding.outpoint]) == {funding.outpoint: deeper}
            raw = await chain.funding_transaction(funding.outpoint)
            assert proven_value(raw.hex(), funding.outpoint, payer.terms.funding_script) == FUNDING_SAT

    async def test_several_outputs(self, chain: Chain, node: Node) -> None:
        """Every unspent output of the address is listed, whatever its value and depth."""
        payer, first = await funded(chain, node, "several")
        others = [Funding(node.fund(address(payer), sat), Sat(sat), 0) for sat in (1_000, 2_000_000_001)]
        await eventually(lambda: as_set(chain.funding(payer.terms)), {first, *others})

    async def test_fault_33_terms_leave_nothing_behind_and_are_answered_for(self, chain: Chain, node: Node) -> None:
        """The node's wallets do not know a script of an unopened channel; payments to it are listed all the same.

        This holds in the mempool and in a block, with the exact value, and for a single named output; nothing is
        imported.
        """
        payer = Payer("address requested", PAST)
        chain.expect(payer.terms)
        await asyncio.sleep(0)
        assert await chain.funding(payer.terms) == ()
        outpoint = node.fund(address(payer), FUNDING_SAT)
        await eventually(lambda: chain.funding(payer.terms), (Funding(outpoint, FUNDING_SAT, 0),))
        assert await chain.funding(payer.terms, outpoint) == (Funding(outpoint, FUNDING_SAT, 0),)
        assert await chain.funding(payer.terms, OutPoint(outpoint.txid, 1 - outpoint.vout)) == ()
        assert await chain.funding(Payer("another", PAST).terms, outpoint) == ()
        node.mine()
        await eventually(lambda: chain.funding(payer.terms), (Funding(outpoint, FUNDING_SAT, 1),))
        wallets = [name for name in node.rpc("listwallets") if name != "miner"]
        assert not any(node.rpc("getaddressinfo", address(payer), wallet=name)["iswatchonly"] for name in wallets)
        assert not any(node.rpc("getaddressinfo", address(payer), wallet=name)["labels"] for name in wallets)
        await chain.adopt(payer.terms, [outpoint])
        settlement = settle(payer, Funding(outpoint, FUNDING_SAT, 1))
        await chain.publish(settlement.transaction)
        node.mine()
        await eventually(lambda: chain.spender(outpoint), Spend(settlement.txid, 1))

    async def test_fault_33_an_output_without_a_confirmation_is_adopted(self, chain: Chain, node: Node) -> None:
        """Confirmation-free: an output adopted from the mempool; its later spend in a block is noticed."""
        payer = Payer("adopted at once", PAST)
        chain.expect(payer.terms)
        outpoint = node.fund(address(payer), FUNDING_SAT)
        await eventually(lambda: chain.funding(payer.terms), (Funding(outpoint, FUNDING_SAT, 0),))
        await chain.adopt(payer.terms, [outpoint])
        settlement = settle(payer, Funding(outpoint, FUNDING_SAT, 0))
        await chain.publish(settlement.transaction)
        node.mine(2)
        await eventually(lambda: chain.spender(outpoint), Spend(settlement.txid, 2))

    async def test_fault_33_a_replaced_output_is_not_adopted(self, chain: Chain, node: Node) -> None:
        """The output is replaced between the listing and the adoption: the caller gets an error, and opens no channel."""
        payer = Payer("replaced", PAST)
        chain.expect(payer.terms)
        outpoint = node.fund(address(payer), FUNDING_SAT)
        await eventually(lambda: chain.funding(payer.terms), (Funding(outpoint, FUNDING_SAT, 0),))
        node.replace(outpoint)
        if isinstance(chain, BitcoindChain):
            with pytest.raises(ChainFailed):
                await chain.adopt(payer.terms, [outpoint])
        await eventually(lambda: chain.funding(payer.terms), ())

    async def test_threat_2_other_scripts(self, chain: Chain, node: Node) -> None:
        """Threat 2: an output to another channel of the same keys does not belong to this one."""
        payer, _ = await funded(chain, node, "whose")
        other = Payer("whose", UnixTime(PAST + 1))
        assert await chain.funding(other.terms) == ()
        outpoint = node.fund(address(other), FUNDING_SAT)
        await eventually(lambda: chain.funding(other.terms), (Funding(outpoint, FUNDING_SAT, 0),))
        assert len(await chain.funding(payer.terms)) == 1

    async def test_coinbase(self, chain: Chain, node: Node) -> None:
        """An output of a coinbase transaction is listed as one, also before it is mature."""
        payer = Payer("miner")
        await chain.watch([payer.terms])
        node.mine(1, to=address(payer))
        await eventually(lambda: coinbase_depths(chain, payer), [(True, 1)])
        node.mine(100)
        await eventually(lambda: coinbase_depths(chain, payer), [(True, 101)])

    async def test_older_than_the_watch(self, chain: Chain, node: Node) -> None:
        """An output older than the watch is found, and after its adoption its spend, too."""
        (funding,) = await chain.funding(OLD.terms)
        assert await chain.funding(OLD.terms, funding.outpoint) == (funding,)
        await chain.adopt(OLD.terms, [funding.outpoint])
        raw = node.rpc("getrawtransaction", funding.outpoint.txid_hex, False, _block_of(node, funding))
        assert without_witness(await chain.transaction(funding.outpoint.txid)) == without_witness(bytes.fromhex(raw))
        assert (funding.value_sat, funding.confirmations > 12) == (FUNDING_SAT, True)
        settlement = settle(OLD, funding)
        await chain.publish(settlement.transaction)
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 1))
        assert await chain.funding(OLD.terms) == ()

    async def test_unknown_outpoint(self, chain: Chain) -> None:
        """An output that never existed is neither unspent nor spent."""
        nothing = OutPoint(b"\x01" * 32, 0)
        assert await chain.unspent([nothing]) == {}
        assert await chain.unspent([]) == {}
        assert await chain.spender(nothing) is None

    async def test_many_outpoints(self, chain: Chain, node: Node) -> None:
        """The unspent outputs are selected from any number."""
        _, funding = await funded(chain, node, "many")
        nothing = [OutPoint(bytes([number]) * 32, 0) for number in range(250)]
        assert await chain.unspent([*nothing, funding.outpoint, *nothing]) == {funding.outpoint: funding}


class TestSpending:
    async def test_unspent_mempool_chain(self, chain: Chain, node: Node) -> None:
        """A spend is seen at once, counts its depth, and removes the output from every list."""
        payer, funding = await funded(chain, node, "life")
        assert await chain.spender(funding.outpoint) is None
        settlement = settle(payer, funding)
        node.send_raw(settlement.transaction)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 0))
        assert await chain.funding(payer.terms) == ()
        assert await chain.unspent([funding.outpoint]) == {}
        for confirmations in (1, 2):
            node.mine()
            await eventually(partial(chain.spender, funding.outpoint), Spend(settlement.txid, confirmations))
        assert await chain.funding(payer.terms) == ()

    async def test_mempool_on_mempool(self, chain: Chain, node: Node) -> None:
        """A funding output that is spent before its confirmation counts as spent."""
        payer, funding = await funded(chain, node, "hasty", confirmations=0)
        refunding = refund(payer, funding)
        node.send_raw(refunding.transaction)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(refunding.txid, 0))
        assert await chain.funding(payer.terms) == ()
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(refunding.txid, 1))

    async def test_replaced_in_the_mempool(self, chain: Chain, node: Node) -> None:
        """Of two transactions that compete for the output, the one in the node's mempool is the spender."""
        payer, funding = await funded(chain, node, "race")
        node.send_raw(settle(payer, funding).transaction)
        refunding = refund(payer, funding)
        node.send_raw(refunding.transaction)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(refunding.txid, 0))
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(refunding.txid, 1))


class TestReserve:
    async def test_coins(self, chain: Chain, node: Node) -> None:
        """Coins that pay to the server's reserve are listed, including those in the mempool and a settlement's change."""
        reserve = reserve_of()
        await chain.watch([reserve])
        coins = [Funding(node.fund(address(reserve), sat), Sat(sat), 0) for sat in (20_000, 30_000)]
        await eventually(lambda: as_set(chain.funding(reserve)), set(coins))
        payer, funding = await funded(chain, node, "helped")
        confirmed = [Funding(coin.outpoint, coin.value_sat, 1) for coin in coins]
        await eventually(lambda: as_set(chain.funding(reserve)), set(confirmed))
        settlement = settle(payer, funding, to=reserve.funding_script, reserve=reserve_of(*coins))
        await chain.publish(settlement.transaction)
        left = Funding(OutPoint(settlement.txid, 1), Sat(100_000 + 50_000 - settlement.fee_sat), 0)
        await eventually(lambda: chain.funding(reserve), (left,))
        for coin in coins:
            assert await chain.spender(coin.outpoint) == Spend(settlement.txid, 0)
        node.mine()
        for coin in coins:
            await eventually(partial(chain.spender, coin.outpoint), Spend(settlement.txid, 1))
        assert await chain.unspent([left.outpoint, *(coin.outpoint for coin in coins)]) == {
            left.outpoint: Funding(left.outpoint, left.value_sat, 1)
        }

    async def test_older_than_the_watch(self, chain: Chain, node: Node) -> None:
        """A coin that was sent before the watch is found."""
        reserve = Reserve(private_key("old reserve").public_key.format())
        outpoint = node.fund(address(reserve), FUNDING_SAT)
        node.mine()
        await eventually(lambda: chain.funding(reserve), (Funding(outpoint, FUNDING_SAT, 1),))


class TestReorganization:
    @pytest.mark.parametrize("depth", [1, 3, 6])
    async def test_threat_3_spend_unconfirmed_again(self, chain: Chain, node: Node, depth: int) -> None:
        """Threat 3: a spend that a reorganization removes from the chain is unconfirmed again, and later confirmed again."""
        payer, funding = await funded(chain, node, f"spend reorganized {depth}")
        settlement = settle(payer, funding)
        node.send_raw(settlement.transaction)
        node.mine(depth)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, depth))
        node.reorg(depth)
        await eventually(lambda: tip_hash(chain), node.best)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 0))
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 1))

    async def test_other_spend_wins(self, chain: Chain, node: Node) -> None:
        """A reorganization that confirms the payer's refund instead of the settlement makes the refund the spender."""
        payer, funding = await funded(chain, node, "other branch")
        settlement, refunding = settle(payer, funding), refund(payer, funding)
        node.send_raw(settlement.transaction)
        node.mine(2)
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 2))
        node.reorg(2, refunding.transaction.hex())
        await eventually(lambda: chain.spender(funding.outpoint), Spend(refunding.txid, 3))
        node.reorg(3, settlement.transaction.hex())
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 4))

    async def test_funding_unconfirmed_again(self, chain: Chain, node: Node) -> None:
        """Funding that a reorganization removes from the chain is listed with 0 confirmations, then deeper again."""
        payer, funding = await funded(chain, node, "funding reorganized", confirmations=2)
        node.reorg(2)
        await eventually(lambda: tip_hash(chain), node.best)
        await eventually(lambda: chain.funding(payer.terms), (Funding(funding.outpoint, FUNDING_SAT, 0),))
        node.mine()
        await eventually(lambda: chain.funding(payer.terms), (Funding(funding.outpoint, FUNDING_SAT, 1),))

    async def test_threat_1_funding_double_spent(self, chain: Chain, node: Node) -> None:
        """Threat 1: replaced funding disappears, from mempool and chain, and reappears when its branch wins."""
        payer, funding = await funded(chain, node, "double spent", confirmations=0)
        raw = node.rpc("getrawtransaction", funding.outpoint.txid_hex)
        node.replace(funding.outpoint)
        await eventually(lambda: chain.funding(payer.terms), ())
        assert await chain.unspent([funding.outpoint]) == {}
        node.mine(2)
        await eventually(lambda: tip_hash(chain), node.best)
        assert await chain.funding(payer.terms) == ()
        assert await chain.spender(funding.outpoint) is None
        node.reorg(2, raw)
        await eventually(lambda: chain.funding(payer.terms), (Funding(funding.outpoint, FUNDING_SAT, 3),))
        settlement = settle(payer, funding)
        await chain.publish(settlement.transaction)
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 1))


class TestTip:
    async def test_tip(self, chain: Chain, node: Node) -> None:
        """The tip's height, hash, time and median time past are the node's."""
        (block_hash,) = node.mine()
        await eventually(lambda: tip_hash(chain), block_hash)
        tip, header = await chain.tip(), node.rpc("getblockheader", block_hash)
        assert (tip.height, tip.time, tip.median_time) == (header["height"], header["time"], header["mediantime"])

    async def test_wait_ends_with_a_block(self, chain: Chain, node: Node) -> None:
        """The wait ends with a new block, long before the time-out."""
        seen = await chain.tip()
        waiting = asyncio.create_task(wait_for_another(chain, seen))
        await asyncio.sleep(0.2)
        node.mine()
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)

    async def test_wait_ends_with_a_shorter_chain(self, chain: Chain, node: Node) -> None:
        """The wait ends when the tip disappears, although no block arrived."""
        node.mine()
        await eventually(lambda: tip_hash(chain), node.best)
        seen = await chain.tip()
        waiting = asyncio.create_task(wait_for_another(chain, seen))
        await asyncio.sleep(0.2)
        node.reorg(1)
        await asyncio.wait_for(waiting, PATIENCE_SECONDS)

    async def test_wait_for_what_is_there(self, chain: Chain, node: Node) -> None:
        """A caller that has seen an older tip does not wait."""
        seen = await chain.tip()
        node.mine()
        await eventually(lambda: tip_hash(chain), node.best)
        await asyncio.wait_for(chain.wait_for_change(seen, 10 * PATIENCE_SECONDS), PATIENCE_SECONDS)

    async def test_wait_ends_with_the_time_out(self, chain: Chain) -> None:
        """The wait ends without any change."""
        await asyncio.wait_for(chain.wait_for_change(await chain.tip(), 0.3), PATIENCE_SECONDS)


class TestPublishing:
    async def test_again_and_again(self, chain: Chain, node: Node) -> None:
        """A broadcast succeeds when new, in the mempool, confirmed, and confirmed with all outputs spent."""
        payer, funding = await funded(chain, node, "publish")
        wallet_address = node.address()
        script = bytes.fromhex(node.rpc("getaddressinfo", wallet_address, wallet="miner")["scriptPubKey"])
        settlement = settle(payer, funding, paid_sat=funding.value_sat, to=script)
        txid = OutPoint(settlement.txid, 0).txid_hex
        await chain.publish(settlement.transaction)
        await chain.publish(settlement.transaction)
        assert node.rpc("getrawmempool") == [txid]
        node.mine()
        await chain.publish(settlement.transaction)
        inputs = {"inputs": [{"txid": txid, "vout": 0}]}
        node.rpc("sendall", [node.address()], None, None, None, inputs, wallet="miner")
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 2))
        await chain.publish(settlement.transaction)
        assert node.rpc("getrawmempool") == []

    async def test_refused(self, chain: Chain, node: Node) -> None:
        """A transaction that no node relays is refused with a reason, and changes nothing."""
        payer, funding = await funded(chain, node, "refused")
        early = Payer("early", UnixTime(int(time.time()) + DAY_SECONDS))
        outpoint = node.fund(address(early), FUNDING_SAT)
        node.mine()
        unsigned = settle(payer, funding).transaction.replace(payer.terms.server_key, payer.terms.client_key)
        for transaction in (refund(early, Funding(outpoint, FUNDING_SAT, 1)).transaction, unsigned):
            with pytest.raises(ChainFailed, match=r"\w"):
                await chain.publish(transaction)
        assert await chain.spender(funding.outpoint) is None
        assert node.rpc("getrawmempool") == []

    async def test_too_late(self, chain: Chain, node: Node) -> None:
        """A settlement whose funding another transaction has spent is refused, in the mempool and in the chain."""
        payer, funding = await funded(chain, node, "too late")
        node.send_raw(refund(payer, funding).transaction)
        with pytest.raises(ChainFailed):
            await chain.publish(settle(payer, funding).transaction)
        node.mine()
        with pytest.raises(ChainFailed):
            await chain.publish(settle(payer, funding).transaction)


class TestRestarts:
    async def test_of_the_server(self, world: World, chain: Chain, node: Node) -> None:
        """A second watch is harmless, and a new backend answers for a channel like the old one."""
        payer, funding = await funded(chain, node, "our restart")
        await chain.watch([payer.terms])
        await chain.watch([payer.terms])
        again = await opened(world)
        try:
            await again.watch([payer.terms])
            await eventually(lambda: again.funding(payer.terms), (funding,))
            settlement = settle(payer, funding)
            node.send_raw(settlement.transaction)
            node.mine()
            await eventually(lambda: again.spender(funding.outpoint), Spend(settlement.txid, 1))
        finally:
            await again.close()
        third = await opened(world)
        try:
            await third.watch([payer.terms])
            await eventually(lambda: third.spender(funding.outpoint), Spend(settlement.txid, 1))
        finally:
            await third.close()

    async def test_threat_33_of_the_node(self, chain: Chain, node: Node) -> None:
        """Threat 33: after the node was stopped, and after it was killed, the same backend recovers by itself."""
        payer, funding = await funded(chain, node, "node restart")
        node.stop()
        node.start()
        await eventually(lambda: asked(chain.funding, payer.terms), (funding,))
        settlement = settle(payer, funding)
        await chain.publish(settlement.transaction)
        node.mine()
        await eventually(lambda: chain.spender(funding.outpoint), Spend(settlement.txid, 1))
        node.kill()  # the node loses the blocks that it had not written yet
        node.start()
        node.mine()
        await eventually(lambda: asked(tip_hash, chain), node.best)
        spend = await asked(chain.spender, funding.outpoint)
        confirmations = node.rpc("gettxout", OutPoint(settlement.txid, 0).txid_hex, 0)["confirmations"]
        assert spend == Spend(settlement.txid, confirmations)


def _block_of(node: Node, funding: Funding) -> str:
    return str(node.rpc("getblockhash", node.height - funding.confirmations + 1))


async def as_set(fundings: Awaitable[tuple[Funding, ...]]) -> set[Funding]:
    return set(await fundings)


async def coinbase_depths(chain: Chain, payer: Payer) -> list[tuple[bool, int]]:
    return [(funding.coinbase, funding.confirmations) for funding in await chain.funding(payer.terms)]


async def wait_for_another(chain: Chain, seen: Any) -> None:
    """Wait as the watcher does: a change may come without a new tip."""
    while await chain.tip() == seen:
        await chain.wait_for_change(seen, 10 * PATIENCE_SECONDS)
