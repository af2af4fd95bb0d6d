"""The life of channels over a real ElectrumX, where the server has no node of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.customer import OPENING_SAT, Customer, wait_for
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
    """Open, pay, close, closed; the reorg is noticed by the header that is no longer there, and it closes again."""
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


def test_threat_6_a_refund_confirmed_first_is_told_from_our_settlement(system: System, node: Node) -> None:
    """The transaction that took the coins is fetched and compared: it is not ours, so the channel is LOST."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.close(OPENING_SAT).status_code == 202
    node.set_mock_time(customer.terms.expiry + 60)
    while node.median_time <= customer.terms.expiry:
        node.mine_only()
    node.mine_only(customer.refund(fee_sat=200_000).transaction.hex())
    node.mine_only()
    customer.ends("lost")
