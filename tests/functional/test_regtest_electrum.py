"""Whole channels over a real ElectrumX: the server has no node of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, Mover, code, wait_for
from tests.lib.electrumx import ElectrumX
from tests.lib.node import Node
from tests.lib.system import System


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", "-txindex=1") as node:
        yield node


@pytest.fixture
def system(tmp_path: Path, node: Node) -> Iterator[System]:
    with ElectrumX(node, tmp_path / "electrumx") as electrumx:
        system = System(tmp_path / "system", node=node)
        text = system.server_file.read_text().replace('backend = "bitcoind"', 'backend = "electrum"')
        system.server_file.write_text(text.replace(node.url, electrumx.tcp_url))
        with system:
            yield system


def test_threat_3_a_closed_channel_is_settled_again_after_a_reorg(system: System, node: Node) -> None:
    """Open, pay, close, closed; the server notices the reorg by the missing header, and the channel closes again."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.pay(OPENING_SAT + 1).status_code == 200
    assert customer.close(OPENING_SAT + 1).status_code == 202
    txid = customer.record["settlement_txid"]
    node.mine(2)
    customer.ends("closed")
    node.reorg(2)
    wait_for(lambda: customer.record["status"] != "closed", "noticed")
    node.mine(2)
    customer.ends("closed")
    assert customer.record["settlement_txid"] == txid


def test_threat_6_a_refund_confirmed_first_is_no_settlement(system: System, node: Node) -> None:
    """The transaction that spent the funding is fetched and compared: it is no settlement, so the channel is LOST."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.close(OPENING_SAT).status_code == 202
    node.set_mock_time(customer.terms.expiry.lock_time + 60)
    while node.median_time <= customer.terms.expiry.lock_time:
        node.mine_only()
    node.mine_only(customer.refund(fee_sat=200_000).transaction.hex())
    node.mine_only()
    customer.ends("lost")


def test_fault_11_moves_after_a_backup_are_followed(system: System, node: Node) -> None:
    """After two withdrawals since the backup, the restored server finds both moves, and takes payments at the last output."""
    customer = Mover(system, node)
    customer.opened()
    backup = system.manage("POST", "/backups").json()["path"]
    for paid in (50_000, 100_000):
        wait_for(lambda paid=paid: customer.pay(OPENING_SAT + paid).status_code == 200, "paid")  # type: ignore[misc]
        customer.withdrawn()
    system.kill_server()
    shutil.rmtree(system.state / "store")
    program = Path(sys.executable).with_name("paychan")
    assert subprocess.run([program, "backup", "restore", system.server_file, backup], check=False).returncode == 0
    system.start_server()

    wait_for(lambda: customer.pay(OPENING_SAT + 120_000).status_code == 200, "paying at the third output")
    assert [system.channel(outpoint)["status"] for outpoint in customer.went] == ["closed", "closed"]
    assert customer.record["funding_value"] == FUNDING_SAT - OPENING_SAT - 100_000


def test_fault_10_a_replaced_funding_ends_the_channel(system: System, node: Node) -> None:
    """Reorganized out and double-spent: UNFUNDED after the depth that ends a channel; open again if it is mined after all."""
    customer = Customer(system, node)
    customer.opened()
    funding = node.rpc("getrawtransaction", customer.outpoint.txid_hex)
    node.invalidate(1)
    node.replace(customer.outpoint)
    node.mine(2)
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code in (503, 410), "no payments")
    node.mine(3)
    customer.ends("unfunded")
    assert code(customer.pay(OPENING_SAT + 1)) == (410, "never_funded")

    node.invalidate(5)
    node.mine_only(funding)
    for _ in range(6):
        node.mine_only()
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 200, "paying again")


def test_fault_12_a_lost_channel_is_settled_when_its_refund_is_reorganized(system: System, node: Node) -> None:
    """The refund is mined deep, then the settlement in its place: LOST, then CLOSED."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.close(OPENING_SAT).status_code == 202
    settlement = customer.record["settlement_transaction"]
    node.set_mock_time(customer.terms.expiry.lock_time + 60)
    while node.median_time <= customer.terms.expiry.lock_time:
        node.mine_only()
    base = node.height
    node.mine_only(customer.refund(fee_sat=200_000).transaction.hex())
    node.mine_only()
    customer.ends("lost")
    node.invalidate(node.height - base)
    node.mine_only(settlement)
    for _ in range(4):
        node.mine_only()
    customer.ends("closed")
