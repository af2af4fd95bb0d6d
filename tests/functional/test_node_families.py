"""One server on nodes of many kinds: it recognises what each supports, and a short channel works on each.

The node is stopped and started with other settings each time; the server is never restarted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.test_regtest_fees import HOUR, newest_fee, pass_time, settling, waiting
from tests.lib.crowdedmempool import CrowdedMempool
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Deployment = tuple[System, Node]

FAMILIES: dict[str, tuple[str, ...]] = {
    "full RBF": ("-mempoolfullrbf=1",),
    "no full RBF": ("-mempoolfullrbf=0",),
    "TRUC accept": ("-mempooltruc=accept",),
    "TRUC enforce": ("-mempooltruc=enforce",),
    "blocksonly": ("-blocksonly", "-walletbroadcast=1"),  # the second is for the test's own wallet
    "pruned": ("-prune=550",),
    "nosettings": ("-nosettings",),
    "mempool of 5 MB": ("-maxmempool=5",),
    "without ZMQ": ("-zmqpubhashblock=0", "-zmqpubsequence=0"),
}

ESTIMATE_SAT_PER_VB = 100
"""More than 40, the rate of the first settlement, and less than 145, which the budget allows."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("deployment")
    with Node(directory / "node", zmq=False) as node, System(directory / "system", node=node) as system:
        yield system, node


def restart(node: Node, *flags: str) -> None:
    """Restart the node with a new cookie; it keeps its mempool."""
    node.stop()
    node.start(*flags)
    if "miner" not in node.rpc("listwallets"):
        node.rpc("loadwallet", "miner")


def alarms(system: System) -> list[str]:
    return [alarm["kind"] for alarm in system.manage("GET", "/health").json()["alarms"]]


def estimate(system: System) -> int | None:
    """Rate of the node's estimate that the server knows now, in satoshi per virtual byte."""
    rate: int | None = system.manage("GET", "/totals").json()["fee_estimate_sat_per_vb"]
    return rate


def lives(deployment: Deployment) -> None:
    """Open, pay, close, settle, on both versions at once."""
    system, node = deployment
    wait_for(lambda: system.manage("GET", "/health").json()["frozen"] == [], "thawed")
    customers = [Customer(*deployment), CustomerV2(*deployment)]
    for customer in customers:
        customer.fund()
    node.mine()
    for customer in customers:
        wait_for(lambda customer=customer: customer.open().status_code == 201, "opened")
        assert customer.pay(OPENING_SAT + 1).status_code == 200
        assert customer.close(OPENING_SAT + 1).status_code in (200, 202)
    for customer, outputs in zip(customers, settled(*customers), strict=True):
        assert outputs[customer.change_script.hex()] == 1_000_000 - OPENING_SAT - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_channel_on_a_node_of_each_family(deployment: Deployment, family: str) -> None:
    """After the node restarts as one of another family, the server opens, takes payments and settles as before."""
    restart(deployment[1], *FAMILIES[family])
    lives(deployment)


def test_fault_28_a_node_with_blocksonly_is_one_alarm_and_takes_payments(deployment: Deployment) -> None:
    """A missing estimate does not freeze payments: one alarm names it, payments continue, and it ends with the setting."""
    system, node = deployment
    restart(node)
    wait_for(lambda: alarms(system) == [], "no alarm")
    customer = Customer(system, node)
    customer.opened()
    restart(node, "-blocksonly")
    wait_for(lambda: alarms(system) == ["node"], "one alarm")
    assert customer.pay(OPENING_SAT + 1).status_code == 200
    assert system.manage("GET", "/health").status_code == 200
    restart(node)
    wait_for(lambda: alarms(system) == [], "no alarm again")


def test_a_settlement_pays_more_when_the_node_asks_for_more(deployment: Deployment) -> None:
    """If a node restarts with a higher floor and without the settlement, it gets one with a higher fee at once."""
    system, node = deployment
    customer = Customer(*deployment)
    customer.opened()
    assert customer.close(OPENING_SAT).status_code == 202
    before = customer.record["settlement_fee"]
    restart(node, "-minrelaytxfee=0.0006")
    wait_for(lambda: customer.record["settlement_fee"] > before, "a higher fee")
    wait_for(lambda: customer.record["settlement_txid"] in node.rpc("getrawmempool"), "in the mempool")
    restart(node)
    node.mine(2)
    customer.ends("closed")
    assert alarms(system) == []


def test_fault_29_the_node_s_wallet_is_unloaded_at_run_time(deployment: Deployment) -> None:
    """Openings and settlements continue without a restart of the server."""
    deployment[1].rpc("unloadwallet", "paychan")
    lives(deployment)


def test_fault_29_the_node_s_wallet_is_lost(deployment: Deployment) -> None:
    """A settlement mined while the wallet was missing is seen, an open channel continues, and new channels open."""
    node = deployment[1]
    going, staying = Customer(*deployment), Customer(*deployment)
    for customer in (going, staying):
        customer.opened()
    assert going.close(OPENING_SAT).status_code == 202
    node.stop()
    shutil.rmtree(node.directory / "regtest" / "wallets" / "paychan")
    node.start()
    node.mine(2)
    going.ends("closed")
    wait_for(lambda: staying.pay(OPENING_SAT + 1).status_code == 200, "payments")
    assert staying.close(OPENING_SAT + 1).status_code == 202
    settled(staying)
    lives(deployment)


def forget_estimates(node: Node) -> None:
    """Restart the node as a process that knows no fee rates."""
    node.stop()
    (node.directory / "regtest" / "fee_estimates.dat").unlink(missing_ok=True)
    node.start()


@pytest.fixture
def crowd(deployment: Deployment) -> Iterator[CrowdedMempool]:
    """Other transactions, from which the node learns fee rates; before and after the test it knows none."""
    forget_estimates(deployment[1])
    if "miner" not in deployment[1].rpc("listwallets"):
        deployment[1].rpc("loadwallet", "miner")
    yield CrowdedMempool(deployment[1])
    forget_estimates(deployment[1])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "blocksonly"])
def test_a_settlement_is_replaced_on_a_node_of_each_family(
    deployment: Deployment, crowd: CrowdedMempool, family: str
) -> None:
    """It waits, the node's estimate rises: a settlement of the same input with a higher fee is accepted and mined.

    A node that only replaces signalling transactions keeps the first one, and a child of it pays.
    """
    system, node = deployment
    restart(node, *FAMILIES[family])
    wait_for(lambda: system.manage("GET", "/health").json()["frozen"] == [], "thawed")
    wait_for(lambda: estimate(system) is None, "the estimate of an earlier test is forgotten")
    customer = Customer(*deployment)
    customer.opened()
    assert customer.close(OPENING_SAT).status_code == 202
    first, fee = customer.record["settlement_txid"], customer.record["settlement_fee"]
    assert node.rpc("getrawmempool") == [first]
    spent = [(each["txid"], each["vout"]) for each in node.rpc("getrawtransaction", first, True)["vin"]]

    crowd.teach(ESTIMATE_SAT_PER_VB)

    if family == "no full RBF":
        wait_for(lambda: len(node.rpc("getrawmempool")) == 2, "a child")
        pays = node.rpc("getmempoolentry", first)
        together, size = pays["fees"]["descendant"] * 100_000_000, pays["descendantsize"]
    else:
        wait_for(lambda: customer.record["settlement_fee"] > fee, "a higher fee")
        wait_for(lambda: node.rpc("getrawmempool") == [customer.record["settlement_txid"]] != [first], "accepted")
        newest = customer.record["settlement_txid"]
        assert [(each["txid"], each["vout"]) for each in node.rpc("getrawtransaction", newest, True)["vin"]] == spent
        pays = node.rpc("getmempoolentry", newest)
        together, size = pays["fees"]["base"] * 100_000_000, pays["vsize"]
    assert together >= size * ESTIMATE_SAT_PER_VB * 0.8  # estimates are those of a bucket
    last = customer.record["settlement_txid"]
    node.mine(2)
    customer.ends("closed")
    assert customer.record["settlement_txid"] == last
    assert node.rpc("gettxout", last, 0)["value"] * 100_000_000 == FUNDING_SAT - OPENING_SAT


def test_a_settlement_is_replaced_on_a_node_of_each_family_without_an_estimate(tmp_path: Path) -> None:
    """With blocksonly, the fee follows the curve alone: near the deadline the node accepts a higher fee, and mines it.

    The chain is separate, and its time advances by a day.
    """
    flags = FAMILIES["blocksonly"]
    with Node(tmp_path / "node", *flags) as node, System(tmp_path / "system", node=node) as system:
        customer = settling(system, node)
        ((first, fee),) = waiting(node).items()
        assert estimate(system) is None
        begun, deadline = max(int(time.time()), node.median_time), customer.terms.expiry.lock_time - 2 * HOUR
        pass_time(node, begun + (deadline - begun) * 9 // 10)
        wait_for(lambda: newest_fee(node) > fee, "a higher fee")
        ((second, more),) = waiting(node).items()
        assert (second == first, more > 2 * fee) == (False, True)
        wait_for(lambda: customer.record["settlement_txid"] == second, "recorded")
        assert [alarm for alarm in alarms(system) if alarm != "clock"] == ["node"]
        node.mine(2)
        customer.ends("closed")
        assert customer.record["settlement_txid"] == second


def test_the_tasks_of_the_server_never_failed(deployment: Deployment) -> None:
    """The tests above ended no task of the server, and no line of its log is a traceback."""
    health = deployment[0].manage("GET", "/health").json()

    assert [task for task in health["tasks"] if task["restarts"]] == []
    assert deployment[0].server is not None
    assert "Traceback" not in deployment[0].server.text()
