"""Misuse of funding on a real chain: outputs of other channels, spent outputs, replaced transactions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bitcoin.core import CMutableTransaction, CMutableTxIn, CMutableTxOut, COutPoint
from bitcoin.core.script import SIGHASH_ALL, CScript, SignatureHash
from coincurve import PrivateKey

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.types import Network, OutPoint
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, code, market, settled, wait_for
from tests.lib.ecdsa import high_s_twin
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("funding")) as place:
        yield place


def test_threat_2_a_funding_of_another_script_opens_nothing(market_place: Market) -> None:
    """Another output of the transaction, another channel's, a plain address, an unknown transaction: all are refused."""
    system, node = market_place
    honest, liar = Customer(system, node), CustomerV2(system, node)
    real, another = liar.fund(), honest.fund()
    plain = node.fund(node.address(), 1_000_000)
    node.mine()
    wrong_output = OutPoint(real.txid, 1 - real.vout)
    for fake in (wrong_output, OutPoint(real.txid, 7), another, plain, OutPoint(bytes(32), 0)):
        liar.outpoint = fake
        assert code(liar.open()) == (400, "funding_not_found")
    liar.outpoint = real
    assert liar.open().status_code == 201


def test_threat_2_a_funding_smaller_than_stated_opens_nothing(market_place: Market) -> None:
    """The value comes from the chain, not from the payer: a larger change would be the server's money."""
    system, node = market_place
    for kind in (Customer, CustomerV2):
        poor = kind(system, node)
        poor.fund(500_000)
        node.mine()
        assert code(poor.open()) == (400, "value_backwards")


@pytest.mark.parametrize("kind", [Customer, CustomerV2])
def test_threat_4_an_outpoint_opens_one_channel_only(market_place: Market, kind: type[Customer]) -> None:
    """Opening again is refused while open, closing, closed, and after a reorg that made the output unspent."""
    system, node = market_place
    customer = kind(system, node)
    customer.opened()
    assert code(customer.open()) == (409, "channel_exists")
    customer.close(OPENING_SAT)
    used = (400, "funding_not_found") if kind is Customer else (409, "outpoint_used")
    assert code(customer.open()) == used
    node.mine(2)
    customer.ends("closed")
    assert code(customer.open()) == used

    node.invalidate(2)
    node.stop()
    node.start("-persistmempool=0")
    wait_for(lambda: system.manage("GET", "/health").status_code == 200, "the node is back")
    assert code(customer.open())[1] in ("outpoint_used", "channel_exists", "funding_not_found")
    node.mine(2)
    customer.ends("closed")


@pytest.mark.parametrize("kind", [Customer, CustomerV2])
def test_threat_1_a_funding_replaced_before_opening_opens_nothing(market_place: Market, kind: type[Customer]) -> None:
    """A double-spend in the mempool, and then in a block: there is nothing to open."""
    system, node = market_place
    customer = kind(system, node)
    node.replace(customer.fund())
    assert code(customer.open()) == (400, "funding_not_found")
    node.mine()
    assert code(customer.open()) == (400, "funding_not_found")


def test_threat_5_the_funding_that_confirms_is_the_one_that_opens(market_place: Market) -> None:
    """It has another txid than the one seen first: only the outpoint in the chain opens, the first one never."""
    system, node = market_place
    customer = CustomerV2(system, node)
    first = customer.fund()
    node.replace(first)
    second = customer.fund()
    node.mine()
    customer.outpoint = first
    assert code(customer.open()) == (400, "funding_not_found")
    customer.outpoint = second
    assert customer.open().status_code == 201


@pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])
def test_threat_5_a_malleated_legacy_funding_opens_under_the_txid_that_was_mined(
    market_place: Market, kind: type[Customer]
) -> None:
    """A third party inverts S in the signature of a P2PKH input and has that mined: the same coins, another outpoint."""
    system, node = market_place
    customer, wallet = kind(system, node), PrivateKey()
    script = key_script(wallet.public_key.format())
    coin = node.fund(encode_address(script, Network.REGTEST), FUNDING_SAT + 1000)
    node.mine()
    spend = CMutableTransaction(
        [CMutableTxIn(COutPoint(coin.txid, coin.vout))], [CMutableTxOut(FUNDING_SAT, customer.terms.funding_script)]
    )
    signature = wallet.sign(SignatureHash(CScript(script), spend, 0, SIGHASH_ALL), hasher=None)

    def signed(signature: bytes) -> bytes:
        spend.vin[0].scriptSig = CScript([signature + bytes([SIGHASH_ALL]), wallet.public_key.format()])
        return bytes(spend.serialize())

    first = OutPoint.parse(node.send_raw(signed(signature)), 0)
    twin = signed(high_s_twin(signature))
    second = OutPoint(bytes(spend.GetTxid()), 0)
    node.mine_only(twin.hex())
    assert node.rpc("getrawmempool") == []
    customer.outpoint = first
    assert code(customer.open())[0] == 400
    customer.outpoint = second
    wait_for(lambda: customer.open().status_code == 201, "opened")
    assert customer.close(OPENING_SAT).status_code in (200, 202)
    (mined,) = settled(customer)
    assert mined[customer.change_script.hex()] == FUNDING_SAT - OPENING_SAT


def test_threat_1_a_funding_double_spent_after_opening_is_never_paid_with(market_place: Market) -> None:
    """Reorganized out and finally double-spent: frozen, shown to the operator, then removed; no task loops."""
    system, node = market_place
    customer = Customer(system, node)
    customer.opened()
    node.invalidate(1)
    node.replace(customer.outpoint)
    node.mine_only()
    node.mine_only()

    def in_danger() -> dict[str, str]:
        found: dict[str, str] = system.manage("GET", "/health").json()["channels_in_danger"]
        return found

    wait_for(lambda: customer.pay(OPENING_SAT).status_code in (503, 410), "no payments")  # a repetition until then
    wait_for(
        lambda: node.mine() and customer.record["status"] == "unfunded", "unfunded"
    )  # blocks since the server saw it disappear
    assert code(customer.pay(OPENING_SAT + 1)) == (410, "never_funded")
    assert code(customer.close(OPENING_SAT)) == (410, "never_funded")
    wait_for(lambda: in_danger() == {}, "no payments to be frozen any more")
    assert customer.record["value_received"] == OPENING_SAT
    node.pass_median_time(customer.terms.expiry.lock_time - 3600)
    assert str(customer.outpoint) not in str(system.manage("GET", "/health").json()["alarms"])
    assert system.server is not None
    assert system.server.process.poll() is None
