"""Server, signer and node are killed a hundred times while channels settle, wait and are outbid (threats 11, 22 and 32).

To repeat it with a report of the fees: `pytest -s tests/crash/test_settling_kills.py`.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from bitcoin.core import CTransaction

from tests.lib.campaign import sized
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, wait_for
from tests.lib.node import Node
from tests.lib.system import System, write_chain

KILLS_IN_A_WAVE, WAVES = 10, sized(3, campaign=10)
HOUR = 3600
_PATIENCE_SECONDS = 60
_KEPT_BLOCKS = 40
"""More blocks than are mined between two kills of the node."""


@pytest.mark.timeout(900)
def test_threat_11_kills_while_settling_lose_nothing(tmp_path: Path) -> None:
    """Every channel ends CLOSED, by one settlement that pays the right amounts to both sides, within its budget."""
    dice, killed = random.Random(11), Counter[str]()
    sections = {"settlement": "batch_seconds = 1\nbatch_channels = 2"}
    with Node(tmp_path / "node") as node, System(tmp_path / "system", sections=sections, node=node) as system:
        fees = []
        for _ in range(WAVES):
            wait_for(lambda: is_well(system), "server, signer and node", _PATIENCE_SECONDS)
            customers = [kind(system, node) for kind in (Customer, CustomerV2, Customer, Customer)]
            write_chain(node)
            begin_to_settle(customers, node)
            for number in range(KILLS_IN_A_WAVE):
                if number in (3, 6):  # the settlements wait, and are outbid
                    pass_time(node, node.median_time + 12 * HOUR)
                time.sleep(dice.uniform(0, 0.2))
                victim = dice.choice((kill_server, kill_signer, kill_node))
                victim(system, node)
                killed[victim.__name__] += 1
            fees += [settled_once(customer, node) for customer in end_of(customers, node)]
        print(f"killed: {dict(killed)}; {len(fees)} settled, none lost, {sum(fees):,} sat of fees")
        assert killed.total() == KILLS_IN_A_WAVE * WAVES


def is_well(system: System) -> bool:
    health = system.manage("GET", "/health")
    return health.status_code == 200 and not health.json()["signer"].startswith("absent")


def begin_to_settle(customers: list[Customer], node: Node) -> None:
    """Two customers close, and two pay everything and wait for each other."""
    for customer in customers:
        customer.fund()
    node.mine()
    for customer in customers:
        wait_for(lambda each=customer: each.open().status_code in (201, 409), "opened", _PATIENCE_SECONDS)
    for customer in customers[:2]:
        wait_for(lambda each=customer: each.close(OPENING_SAT).status_code in (200, 202), "closing")
    for customer in customers[2:]:
        wait_for(lambda each=customer: each.pay(FUNDING_SAT).status_code in (202, 410), "drained")


def end_of(customers: list[Customer], node: Node) -> list[Customer]:
    """Wait until all settlements are mined."""
    for customer in customers:
        wait_for(lambda each=customer: in_mempool(each, node), "in the mempool", _PATIENCE_SECONDS)
    node.mine(2)
    for customer in customers:
        wait_for(lambda each=customer: ended(each), "closed", _PATIENCE_SECONDS)
    return customers


def in_mempool(customer: Customer, node: Node) -> bool:
    try:
        return customer.record["settlement_txid"] in node.rpc("getrawmempool")
    except httpx.HTTPError:
        return False


def ended(customer: Customer) -> bool:
    return customer.record["status"] == "closed"


def settled_once(customer: Customer, node: Node) -> int:
    """Compare the block's settlement with both sides' amounts; return the channel's share of the fee in satoshi."""
    record = customer.record
    raw = node.rpc("gettransaction", record["settlement_txid"], True, True, wallet="paychan")["hex"]
    transaction = CTransaction.deserialize(bytes.fromhex(raw))
    spent = [(bytes(txin.prevout.hash), txin.prevout.n) for txin in transaction.vin]
    assert spent.count((customer.outpoint.txid, customer.outpoint.vout)) == 1
    outputs = [out.nValue for out in transaction.vout]
    received = record["value_received"]
    if record["value_left"]:
        assert outputs[0] == FUNDING_SAT - received == record["value_left"]
        fee = received - sum(outputs[1:])
    else:
        fee = (FUNDING_SAT * len(spent) - sum(outputs)) // len(spent)
    assert 0 < fee <= received // 2
    return int(fee)


def pass_time(node: Node, unix_time: int) -> None:
    """Advance the median time past beyond a time, with blocks without any of the waiting transactions."""
    node.set_mock_time(unix_time + 60)
    while node.median_time <= unix_time:
        node.mine_only()


def kill_server(system: System, node: Node) -> None:
    system.restart_server()


def kill_signer(system: System, node: Node) -> None:
    assert system.signer is not None
    system.signer.stop(signal.SIGKILL)
    system.start_signer()


def kill_node(system: System, node: Node) -> None:
    """Kill the node: it loses its mempool and the blocks that it had not written; its peers would send the blocks."""
    first, height = max(1, node.height - _KEPT_BLOCKS), node.height
    blocks = [node.rpc("getblock", node.rpc("getblockhash", each), 0) for each in range(first, height + 1)]
    clock = node.rpc("getblockheader", node.best)["time"] + 60
    node.kill()
    node.start(f"-mocktime={clock}")
    assert node.height >= first - 1
    for block in blocks[node.height + 1 - first :]:
        node.rpc("submitblock", block)
    write_chain(node)
