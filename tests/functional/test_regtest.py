"""Whole channels on a real node: the real server and signer, a real regtest bitcoind, really signed transactions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from bitcoin.core import CTransaction

from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import MAX_FUNDING_BYTES
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, code, wait_for
from tests.lib.node import Node
from tests.lib.system import System


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "node") as node:
        yield node


@pytest.fixture
def system(tmp_path: Path, node: Node) -> Iterator[System]:
    with System(tmp_path / "system", node=node) as system:
        yield system


def test_a_whole_channel(system: System, node: Node) -> None:
    """Fund, wait for the block, open, pay, close; the settlement confirms and pays both sides their amounts."""
    customer = Customer(system, node)
    assert code(customer_opens_unfunded(customer)) == (400, "funding_not_found")
    customer.fund()
    assert code(customer.open()) == (400, "funding_unconfirmed")
    node.mine()

    assert customer.open().status_code == 201
    assert customer.pay(OPENING_SAT + 1).json()["value_received"] == 1
    closed = customer.close(OPENING_SAT + 1)

    assert closed.status_code == 202
    txid = closed.json()["settlement_txid"]
    assert node.rpc("getrawmempool") == [txid]
    node.mine(2)
    wait_for(lambda: customer.record["status"] == "closed", "closed")
    record = customer.record
    assert (record["settlement_txid"], record["spent_by"]) == (txid, None)
    outputs = [out.nValue for out in CTransaction.deserialize(bytes.fromhex(record["settlement_transaction"])).vout]
    assert outputs == [FUNDING_SAT - OPENING_SAT - 1, OPENING_SAT + 1 - record["settlement_fee"]]
    assert code(customer.open()) == (400, "funding_not_found")


def customer_opens_unfunded(customer: Customer) -> httpx.Response:
    customer.outpoint = OutPoint(bytes(32), 0)
    return customer.open()


def test_a_funding_transaction_larger_than_nodes_relay_opens_no_channel(system: System, node: Node) -> None:
    """The signer reads no such transaction, so its channel is refused with its size; the largest that nodes relay is not."""
    customer = Customer(system, node)
    most = MAX_FUNDING_BYTES
    customer.outpoint = node.fund_in_block(customer.address, FUNDING_SAT, bytes(most))

    refused = customer.open()

    assert code(refused) == (400, "funding_too_large")
    size = int(re.findall(rf"got (\d+) bytes, need at most {most}", refused.text)[0])
    assert size > most
    largest = Customer(system, node)
    largest.outpoint = node.fund_in_block(largest.address, FUNDING_SAT, bytes(most - (size - most)))
    assert largest.open().status_code == 201
    assert largest.close(OPENING_SAT).status_code == 202


def test_a_payer_sees_how_deep_its_funding_is(system: System, node: Node) -> None:
    """The outputs of an address are listed with depth and required depth, from the mempool on, also if another payer paid it."""
    customer = Customer(system, node)
    path = f"/v2/funding/{customer.query['exp_time']}/{customer.query['client_pubkey']}/outputs"
    assert customer.ask("GET", path).json() == {"funding_address": customer.address, "outputs": []}
    customer.fund()
    seen = customer.ask("GET", path).json()["outputs"]
    node.mine(3)
    deeper = customer.ask("GET", path).json()["outputs"]

    assert [(out["value"], out["confirmations"], out["confirmations_needed"]) for out in seen] == [(FUNDING_SAT, 0, 1)]
    assert deeper == [seen[0] | {"confirmations": 3}]


def test_threat_3_a_reorganized_funding_freezes_the_channel_until_it_is_back(system: System, node: Node) -> None:
    """While the funding is unconfirmed, payments get 503 and nothing is lost; after that they continue."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.pay(OPENING_SAT + 1).status_code == 200

    node.invalidate(1)
    wait_for(lambda: customer.pay(OPENING_SAT + 2).status_code == 503, "frozen")
    assert code(customer.pay(OPENING_SAT + 2)) == (503, "chain_unavailable")
    node.mine(2)
    wait_for(lambda: customer.pay(OPENING_SAT + 2).status_code == 200, "thawed")
    assert customer.record["value_received"] == OPENING_SAT + 2


def test_threat_33_without_a_node_no_payment_is_accepted(system: System, node: Node) -> None:
    """With the node stopped, payments are refused with the reason; once it runs, they continue."""
    customer = Customer(system, node)
    customer.opened()
    node.stop()
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 503, "frozen")
    health = system.manage("GET", "/health")
    assert health.status_code == 503
    assert "the chain does not answer" in health.json()["frozen"][0]

    node.start()
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 200, "thawed")


def test_threat_6_payments_end_by_median_time_past(system: System, node: Node) -> None:
    """The server's clock is before the deadline, the chain's is past it: payments end and the channel closes by itself."""
    customer = Customer(system, node)
    customer.opened()
    node.pass_median_time(customer.terms.expiry.lock_time - 6 * 3600)
    wait_for(lambda: customer.record["status"] in ("published", "closed"), "published")
    assert customer.record["close_reason"] == "expiry"
    assert customer.pay(OPENING_SAT + 1).status_code == 410
    node.mine(2)
    wait_for(lambda: customer.record["status"] == "closed", "closed")


def test_the_payers_refund_confirmed_first_is_a_loss_with_its_txid(system: System, node: Node) -> None:
    """The server was down beyond the expiry: the refund wins, the channel ends LOST with the txid, no task loops."""
    customer = Customer(system, node)
    customer.opened()
    system.kill_server()
    node.pass_median_time(customer.terms.expiry.lock_time)
    refund = customer.refund()
    txid = node.send_raw(refund.transaction)
    node.mine(2)

    system.start_server()
    wait_for(lambda: customer.record["status"] == "lost", "lost")
    assert customer.record["spent_by"] == txid
    assert system.server is not None
    assert system.server.process.poll() is None
    assert UnixTime(node.median_time) > customer.terms.expiry.lock_time


def test_threat_34_a_channel_overdue_at_start_is_settled(system: System, node: Node) -> None:
    """A server that was down finds the overdue channel at start, and broadcasts its settlement without a request."""
    customer = Customer(system, node)
    customer.opened()
    system.kill_server()
    node.pass_median_time(customer.terms.expiry.lock_time - 3600)
    system.start_server()
    wait_for(lambda: node.rpc("getrawmempool") != [], "published")
    node.mine(2)
    wait_for(lambda: customer.record["status"] == "closed", "closed")


def test_threat_3_a_reorganized_settlement_is_published_again(system: System, node: Node) -> None:
    """A settlement that left the chain is broadcast again by the server, from the stored transaction."""
    customer = Customer(system, node)
    customer.opened()
    txid = customer.close(OPENING_SAT).json()["settlement_txid"]
    node.mine()
    node.reorg(1)
    wait_for(lambda: txid in node.rpc("getrawmempool"), "published again")
    node.mine(2)
    wait_for(lambda: customer.record["status"] == "closed", "closed")
    assert customer.record["settlement_txid"] == txid
