"""The life of channels on a real node: the real server and signer, a real regtest bitcoind, really signed transactions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bitcoin.core import CTransaction
from coincurve import PrivateKey

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.payment import Payment, encode_v1, sign_payment
from paychan.protocol.refund import sign_refund
from paychan.protocol.scripts import ChannelTerms, make_terms
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from tests.lib.node import Node
from tests.lib.system import System

FUNDING_SAT = 1_000_000
OPENING_SAT = 100_000
LIFE_SECONDS = 40 * 3600


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "node") as node:
        yield node


@pytest.fixture
def system(tmp_path: Path, node: Node) -> Iterator[System]:
    with System(tmp_path / "system", node=node) as system:
        yield system


class Customer:
    """A v1 client with a channel funded on the chain."""

    def __init__(self, system: System, node: Node) -> None:
        self.system, self.node = system, node
        self.key = PrivateKey()
        self.change_script = key_script(self.key.public_key.format())
        self.query = {
            "client_pubkey": self.key.public_key.format().hex(),
            "exp_time": str(int(time.time()) + LIFE_SECONDS),
        }
        info = self.ask("GET", "/v1/fundingInfo", **self.query).json()
        self.terms: ChannelTerms = make_terms(
            bytes.fromhex(info["server_pubkey"]), self.key.public_key.format(), int(self.query["exp_time"])
        )
        self.address: str = info["funding_address_copy"]
        assert self.address == self.terms.funding_address(Network.REGTEST)

    def fund(self, sat: int = FUNDING_SAT) -> OutPoint:
        self.outpoint = self.node.fund(self.address, sat)
        return self.outpoint

    def ask(self, method: str, path: str, **query: str) -> httpx.Response:
        return httpx.request(method, self.system.url + path, params=query, timeout=30, verify=False)

    def payment(self, paid_sat: int) -> Payment:
        return sign_payment(self.key, self.terms, self.outpoint, self.change_script, Sat(FUNDING_SAT - paid_sat))

    def open(self) -> httpx.Response:
        change = encode_address(self.change_script, Network.REGTEST)
        payment = encode_v1(self.payment(OPENING_SAT))
        return self.ask("POST", "/v1/channels/new", **self.query, change_address=change, payment=payment)

    def pay(self, paid_sat: int) -> httpx.Response:
        return self.ask("PUT", self.path, payment=encode_v1(self.payment(paid_sat)))

    def close(self, paid_sat: int) -> httpx.Response:
        return self.ask("DELETE", self.path, payment=encode_v1(self.payment(paid_sat)))

    @property
    def path(self) -> str:
        return f"/v1/channels/{self.outpoint.txid_hex}/{self.outpoint.vout}"

    @property
    def record(self) -> dict[str, Any]:
        return self.system.channel(self.outpoint)

    def opened(self) -> None:
        self.fund()
        self.node.mine()
        wait_for(lambda: self.open().status_code == 201, "opened")


def wait_for(true: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Wait for something that the server does by itself."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def test_the_whole_life_of_a_channel(system: System, node: Node) -> None:
    """Fund, wait for the block, open, pay, close; the settlement confirms and pays both sides what they are owed."""
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


def test_a_payer_sees_how_deep_its_funding_is(system: System, node: Node) -> None:
    """The outputs of an address are listed with depth and need, from the mempool on; a stranger's amounts are his."""
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
    """Nothing is accepted on air, and nothing is lost: 503 while the funding is unconfirmed, then as before."""
    customer = Customer(system, node)
    customer.opened()
    assert customer.pay(OPENING_SAT + 1).status_code == 200

    node.invalidate(1)
    wait_for(lambda: customer.pay(OPENING_SAT + 2).status_code == 503, "frozen")
    assert code(customer.pay(OPENING_SAT + 2)) == (503, "chain_unavailable")
    node.mine(2)
    wait_for(lambda: customer.pay(OPENING_SAT + 2).status_code == 200, "thawed")
    assert customer.record["value_received"] == OPENING_SAT + 2


def test_threat_33_without_a_node_nothing_is_accepted_and_it_comes_back_by_itself(system: System, node: Node) -> None:
    """A stopped node: payments are refused with the reason; when it is back, they go on."""
    customer = Customer(system, node)
    customer.opened()
    node.stop()
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 503, "frozen")
    health = system.manage("GET", "/health")
    assert health.status_code == 503
    assert "can't be asked" in health.json()["frozen"][0]

    node.start()
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 200, "thawed")


def test_threat_6_payments_end_by_median_time_past(system: System, node: Node) -> None:
    """Our clock says there is time; the chain's says there is not: payments end and the channel closes by itself."""
    customer = Customer(system, node)
    customer.opened()
    node.pass_median_time(customer.terms.expiry - 6 * 3600)
    wait_for(lambda: customer.record["status"] in ("closing", "published", "closed"), "closing")
    assert customer.record["close_reason"] == "expiry"
    assert customer.pay(OPENING_SAT + 1).status_code == 410
    node.mine(2)
    wait_for(lambda: customer.record["status"] == "closed", "closed")


def test_the_payers_refund_confirmed_first_is_a_loss_with_its_txid(system: System, node: Node) -> None:
    """The server was away beyond expiry: the refund wins, the channel ends LOST with the txid, and nothing loops."""
    customer = Customer(system, node)
    customer.opened()
    system.kill_server()
    node.pass_median_time(customer.terms.expiry)
    script = key_script(customer.key.public_key.format())
    refund = sign_refund(customer.key, customer.terms, customer.outpoint, Sat(FUNDING_SAT), script, Sat(10_000))
    txid = node.send_raw(refund.transaction)
    node.mine(2)

    system.start_server()
    wait_for(lambda: customer.record["status"] == "lost", "lost")
    assert customer.record["spent_by"] == txid
    assert system.server is not None
    assert system.server.process.poll() is None
    assert UnixTime(node.median_time) > customer.terms.expiry


def test_threat_34_a_channel_overdue_at_start_is_settled(system: System, node: Node) -> None:
    """A server that was away finds the overdue channel at start, and its settlement is in the mempool by itself."""
    customer = Customer(system, node)
    customer.opened()
    system.kill_server()
    node.pass_median_time(customer.terms.expiry - 3600)
    system.start_server()
    wait_for(lambda: node.rpc("getrawmempool") != [], "published")
    node.mine(2)
    wait_for(lambda: customer.record["status"] == "closed", "closed")


def test_threat_3_a_reorganized_settlement_is_published_again(system: System, node: Node) -> None:
    """A settlement that left the chain is brought back by the server, from the stored transaction."""
    customer = Customer(system, node)
    customer.opened()
    txid = customer.close(OPENING_SAT).json()["settlement_txid"]
    node.mine()
    node.reorg(1)
    wait_for(lambda: txid in node.rpc("getrawmempool"), "published again")
    node.mine(2)
    wait_for(lambda: customer.record["status"] == "closed", "closed")
    assert customer.record["settlement_txid"] == txid
