"""Reorgs on a real chain, one to six blocks deep, in every state of a channel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paychan.protocol.address import encode_address, p2pkh_script
from paychan.protocol.types import Network
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System, dead_signer

Market = tuple[System, Node]

ELSEWHERE = encode_address(p2pkh_script(bytes(20)), Network.REGTEST)
"""The next 100 coinbases pay another address, so the miner never funds with a coinbase that a reorg makes immature."""


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("reorg")) as (system, node):
        node.mine(100, to=ELSEWHERE)
        yield system, node


class Scene:
    """Channels of both versions, funded four blocks ago: open, settlement unconfirmed, one deep, and three deep."""

    def __init__(self, system: System, node: Node) -> None:
        self.node = node
        node.mine(2)
        customers = [kind(system, node) for kind in (Customer, CustomerV2, CustomerV2, Customer)]
        for each in customers:
            each.fund()
        node.mine()
        for each in customers:
            wait_for(lambda each=each: each.open().status_code == 201, "opened")  # type: ignore[misc]
        self.open, self.unconfirmed, self.shallow, self.closed = customers
        self.settled = customers[1:]
        self.closed.close(OPENING_SAT)
        node.mine(2)
        self.closed.ends("closed")
        self.shallow.close(OPENING_SAT)
        node.mine()
        self.unconfirmed.close(OPENING_SAT)
        self.txids = [each.record["settlement_txid"] for each in self.settled]

    def fund_again(self) -> None:
        """Broadcast the fundings again, as wallets do: the node dropped those whose lock time is not reached."""
        for each in (self.open, *self.settled):
            sent = self.node.rpc("gettransaction", each.outpoint.txid_hex, wallet="miner")
            self.node.send_raw(bytes.fromhex(sent["hex"]))


@pytest.mark.parametrize("depth", range(1, 7))
def test_threat_3_after_a_reorg_everything_ends_as_it_should(market_place: Market, depth: int) -> None:
    """Payments stop exactly while the funding is out of the chain; each settlement ends confirmed, with the same txid."""
    system, node = market_place
    scene = Scene(system, node)
    node.reorg(depth)
    if depth >= 4:
        wait_for(lambda: scene.open.pay(OPENING_SAT + 1).status_code in (503, 410), "frozen")
    if depth >= 3:
        wait_for(lambda: scene.closed.record["status"] != "closed", "noticed")
    if depth >= 4:
        scene.fund_again()
        wait_for(lambda: set(scene.txids) <= set(node.rpc("getrawmempool")), "published again")
    node.mine(2)

    wait_for(lambda: scene.open.pay(OPENING_SAT + 2).status_code == 200, "thawed")
    for each, txid in zip(scene.settled, scene.txids, strict=True):
        each.ends("closed")
        assert each.record["settlement_txid"] == txid
        assert node.rpc("gettxout", each.outpoint.txid_hex, each.outpoint.vout) is None


def test_threat_3_a_reorg_during_downtime_is_noticed_at_start(market_place: Market) -> None:
    """A new process checks closed channels again: it cannot know what it missed."""
    system, node = market_place
    scene = Scene(system, node)
    system.kill_server()
    node.reorg(3)
    system.start_server()
    scene.closed.ends("published")
    node.mine(2)
    for each in scene.settled:
        each.ends("closed")


def test_threat_3_a_closed_channel_whose_settlement_is_gone_is_settled_again(market_place: Market) -> None:
    """Missing in chain, mempool and wallets: the server broadcasts the stored transaction again."""
    system, node = market_place
    scene = Scene(system, node)
    node.invalidate(3)
    node.stop()
    node.start("-persistmempool=0", "-walletbroadcast=0")
    node.mine_only()
    for txid in scene.txids:
        wait_for(lambda txid=txid: txid in node.rpc("getrawmempool"), "published again")  # type: ignore[misc]
    node.mine(2)
    for each in scene.settled:
        each.ends("closed")
    node.stop()
    node.start()


@pytest.mark.parametrize("depth", range(1, 7))
def test_threat_3_a_closing_that_waits_for_the_signer_survives_a_reorg(market_place: Market, depth: int) -> None:
    """CLOSING without a signature: wherever the funding went, the settlement is mined once both are back."""
    system, node = market_place
    node.mine(2)
    wait_for(lambda: system.manage("GET", "/health").status_code == 200, "a server that follows its node again")
    customer = (Customer, CustomerV2)[depth % 2](system, node)
    customer.opened()
    node.mine(3)
    with dead_signer(system, node):
        assert customer.close(OPENING_SAT).status_code == 503
        node.reorg(depth)
        assert customer.record["status"] == "closing"
    if depth >= 4:
        sent = node.rpc("gettransaction", customer.outpoint.txid_hex, wallet="miner")
        node.send_raw(bytes.fromhex(sent["hex"]))
    (mined,) = settled(customer)
    assert mined[customer.change_script.hex()] == FUNDING_SAT - OPENING_SAT


def test_threat_3_a_lost_channel_stays_lost_in_every_reorg(market_place: Market) -> None:
    """LOST is final: up to six blocks deep, with the refund out of the chain, no payment is accepted and no task loops."""
    system, node = market_place
    lost = Customer(system, node)
    lost.opened()
    system.kill_server()
    node.pass_median_time(lost.terms.expiry.lock_time)
    txid = node.send_raw(lost.refund().transaction)
    node.mine(2)
    system.start_server()
    lost.ends("lost")
    alive = CustomerV2(system, node)
    alive.opened()
    node.mine(4)
    for depth in range(1, 7):
        node.reorg(depth)
        tip = node.best
        wait_for(lambda tip=tip: seen_tip(system) == tip, "noticed")  # type: ignore[misc]
        assert (lost.record["status"], lost.record["spent_by"]) == ("lost", txid)
        assert lost.pay(OPENING_SAT + 1).status_code == 410
        node.mine()
    wait_for(lambda: alive.pay(OPENING_SAT + 1).status_code == 200, "thawed")


def seen_tip(system: System) -> str:
    return str(system.manage("GET", "/health").json()["chain"].get("block_hash"))
