"""The race between settlement and refund on a real chain, on both sides of median time past (BIP113)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from bitcoin.core import CMutableTransaction, CTransaction
from bitcoin.core.script import CScript

from paychan.protocol.types import Sat
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, market, wait_for
from tests.lib.ecdsa import sign_with_nonce
from tests.lib.node import Node, NodeError
from tests.lib.system import System

Market = tuple[System, Node]

VERIFY_REJECTED = -26
"""Bitcoin Core, rpc/protocol.h: RPC_VERIFY_REJECTED"""


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("refund")) as place:
        yield place


def settlement_of(system: System, customer: Customer) -> bytes:
    """Close, and return the settlement that the operator sees."""
    assert customer.close(OPENING_SAT).status_code == 202
    return bytes.fromhex(customer.record["settlement_transaction"])


def signed_again(customer: Customer, settlement: bytes) -> bytes:
    """Return the same settlement with a second signature of the client, as only the client can make."""
    payment = customer.payment(OPENING_SAT)
    digest = customer.terms.kind.payment_digest(
        customer.terms, customer.outpoint, Sat(FUNDING_SAT), customer.change_script, payment.change_sat
    )
    others = (sign_with_nonce(customer.key, digest, nonce) for nonce in range(1, 1000))
    other = next(signature for signature in others if len(signature) == len(payment.signature))
    changed = settlement.replace(payment.signature, other)
    assert changed != settlement
    return changed


def other_selector(customer: Customer, settlement: bytes) -> bytes:
    """Return the same settlement with 2 instead of 1 as selector: also true, and covered by no signature."""
    transaction = CMutableTransaction.from_tx(CTransaction.deserialize(settlement))
    script = bytes(transaction.vin[0].scriptSig)
    tail = b"\x4c" + bytes([len(customer.terms.redeem_script)]) + customer.terms.redeem_script
    assert script.endswith(b"\x51" + tail)
    transaction.vin[0].scriptSig = CScript(script[: -len(tail) - 1] + b"\x52" + tail)
    return bytes(transaction.serialize())


def alarms(system: System) -> str:
    return str(system.manage("GET", "/health").json()["alarms"])


def test_threat_6_one_second_before_median_time_past_the_refund_is_not_final(market_place: Market) -> None:
    """At a median time of exactly the expiry no node accepts the refund; a second later all do, and the server has won."""
    system, node = market_place
    customer = Customer(system, node)
    customer.opened()
    system.kill_server()
    move_median_time_to(node, customer.terms.expiry.lock_time)
    with pytest.raises(NodeError) as refused:
        node.send_raw(customer.refund().transaction)
    assert refused.value.code == VERIFY_REJECTED
    move_median_time_to(node, customer.terms.expiry.lock_time + 1)
    assert node.rpc("testmempoolaccept", [customer.refund().transaction.hex()])[0]["allowed"]

    system.start_server()
    wait_for(lambda: node.rpc("getrawmempool") != [], "settled")
    node.mine(2)
    customer.ends("closed")
    assert "lost" not in alarms(system)


def test_threat_6_a_refund_confirmed_first_is_a_reported_loss(market_place: Market) -> None:
    """The settlement was signed, even broadcast, but the refund is in the block: LOST, with the txid in log and alarms."""
    system, node = market_place
    customer = Customer(system, node)
    customer.opened()
    node.pass_median_time(customer.terms.expiry.lock_time - 6 * 3600 + 60)
    wait_for(lambda: customer.record["settlement_txid"] is not None, "settlement published")
    refund = customer.refund(fee_sat=200_000)
    mine_empty_until(node, customer.terms.expiry.lock_time)
    node.mine_only(refund.transaction.hex())
    node.mine_only()

    txid = refund.txid[::-1].hex()
    customer.ends("lost")
    assert customer.record["spent_by"] == txid
    wait_for(
        lambda: (
            str({"kind": "lost", "text": f"funding output was spent by {txid}", "channel": str(customer.outpoint)})[:-1]
            in alarms(system)
        ),
        "alarm",
    )
    assert system.server is not None
    assert f"txid={txid}" in system.server.text()
    assert customer.pay(OPENING_SAT + 1).status_code == 410


@pytest.mark.parametrize("malleated", [signed_again, other_selector])
@pytest.mark.parametrize("expired", [False, True], ids=["before expiry", "after expiry"])
def test_threat_18_a_malleated_settlement_closes_the_channel(
    market_place: Market, expired: bool, malleated: Callable[[Customer, bytes], bytes]
) -> None:
    """The client signs again, or a third party changes the selector: the same payout, so CLOSED and not LOST."""
    system, node = market_place
    customer = Customer(system, node)
    customer.opened()
    settlement = settlement_of(system, customer)
    if expired:
        mine_empty_until(node, customer.terms.expiry.lock_time)
    changed = malleated(customer, settlement)
    node.mine_only(changed.hex())
    assert node.rpc("getrawmempool") == []
    node.mine_only()
    customer.ends("closed")
    txid = CTransaction.deserialize(changed).GetTxid()[::-1].hex()
    assert (customer.record["settlement_txid"], customer.record["spent_by"]) == (txid, None)
    assert str(customer.outpoint) not in alarms(system)


def move_median_time_to(node: Node, unix_time: int) -> None:
    """Mine until the median time past is exactly this: from the sixth of eleven blocks with that very time."""
    node.set_mock_time(unix_time)
    for _ in range(6):
        node.mine()
    assert node.median_time == unix_time


def mine_empty_until(node: Node, unix_time: int) -> None:
    """Pass a median time with blocks without transactions of the mempool."""
    node.set_mock_time(unix_time + 60)
    while node.median_time <= unix_time:
        node.mine_only()
