"""Addresses of each type on a real chain: change, closing, refund and the operator's destination, all relayed and mined."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pytest

from paychan.protocol.address import decode_address, encode_address, least_relayed_sat, witness_script
from paychan.protocol.fees import RELAY_FLOOR_SAT_PER_VB
from paychan.protocol.types import Network, OutPoint
from tests.functional import test_regtest_payer
from tests.functional.test_regtest_payer import FUNDING_SAT as PAYER_FUNDING_SAT
from tests.functional.test_regtest_payer import PayerAtTerminal
from tests.functional.test_settle_offline import disaster
from tests.functional.test_settle_offline import settled as settled_offline
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, Mover, code, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

node, system, payer = test_regtest_payer.node, test_regtest_payer.system, test_regtest_payer.payer

WALLET_TYPES = {"p2pkh": "legacy", "p2sh": "p2sh-segwit", "p2wpkh": "bech32", "p2tr": "bech32m"}
TYPES = [*WALLET_TYPES, "p2wsh"]
WITNESS_TYPES = ["p2wpkh", "p2wsh", "p2tr"]
REFUSED = [
    ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "address of the live network"),
    ("tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx", "address of the test network"),
    ("bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt08q", "wrong checksum"),
    ("bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt081", "the character 1 after the prefix"),
    ("bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt08O", "mixed"),
    ("bcrt1pfeesnyr2tx", "witness version 1 with 2 bytes, whose outputs need no signature"),
]
"""Addresses that a regtest server refuses, and why."""


def new_address(node: Node, kind: str) -> str:
    """A new address of the node's wallet; that of P2WSH needs no signature."""
    if kind == "p2wsh":
        return encode_address(witness_script(0, sha256(b"\x51").digest()), Network.REGTEST)
    return str(node.rpc("getnewaddress", "", WALLET_TYPES[kind], wallet="miner"))


def with_change(customer: Customer, kind: str) -> Customer:
    """Give the customer a change address of a type."""
    customer.change_address = new_address(customer.node, kind)
    customer.change_script = decode_address(customer.change_address, Network.REGTEST)
    return customer


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("addresses")) as place:
        yield place


@pytest.mark.parametrize("change", TYPES)
@pytest.mark.parametrize("version", [Customer, CustomerV2], ids=["v1", "v2"])
def test_fault_43_change_goes_to_each_type(market_place: Market, version: type[Customer], change: str) -> None:
    """Open, pay and close; the settlement pays the change, its fee is that of its size, and it confirms."""
    customer = with_change(version(*market_place), change)
    customer.opened()
    assert customer.pay(OPENING_SAT + 2_000).status_code == 200
    assert customer.close(OPENING_SAT + 2_000).status_code in (200, 202)
    record = customer.record
    entry = customer.node.rpc("getmempoolentry", record["settlement_txid"])
    script, size = customer.change_script, entry["vsize"]

    (paid,) = settled(customer)

    assert paid[script.hex()] == FUNDING_SAT - OPENING_SAT - 2_000
    assert record["settlement_fee"] == round(entry["fees"]["base"] * 100_000_000) >= size * RELAY_FLOOR_SAT_PER_VB
    inputs_and_server_output = size - len(script)
    assert 250 < inputs_and_server_output < 330


@pytest.mark.parametrize("change", WITNESS_TYPES)
def test_fault_43_a_closing_names_an_address_of_each_type(market_place: Market, change: str) -> None:
    """A channel with P2PKH change closes to a witness address, written in upper case."""
    customer = CustomerV2(*market_place)
    customer.opened()
    elsewhere = with_change(customer, change)
    body = {
        "payment_data": {
            "change_value": FUNDING_SAT - OPENING_SAT,
            "signature_data": customer.payment(OPENING_SAT).signature.hex(),
            "sighash_flag": "83",
            "change_address": elsewhere.change_address.upper(),
        },
        "application_data": "",
    }

    answer = customer.ask("PUT", f"{customer.path}/close", json.dumps(body).encode(), secret=customer.secret)

    assert answer.status_code in (200, 202), answer.text
    (paid,) = settled(customer)
    assert paid[elsewhere.change_script.hex()] == FUNDING_SAT - OPENING_SAT


@pytest.mark.parametrize("version", [Customer, CustomerV2], ids=["v1", "v2"])
def test_fault_43_refusals_name_types_and_networks(market_place: Market, version: type[Customer]) -> None:
    """Addresses of other networks or versions, and damaged ones, are refused; the channel can still be opened."""
    customer = version(*market_place)
    good = customer.change_address
    customer.fund()
    customer.node.mine()
    for address, reason in REFUSED:
        customer.change_address = address
        refused = customer.open()

        assert code(refused) == (400, "malformed")
        assert reason in refused.json()["message"]
        assert "want a P2PKH, P2SH, P2WPKH, P2WSH or P2TR address of the regtest network" in refused.json()["message"]
    customer.change_address = good
    wait_for(lambda: customer.open().status_code == 201, "opened")


@pytest.mark.parametrize("destination", TYPES)
def test_fault_43_the_server_is_paid_at_each_type(tmp_path: Path, destination: str) -> None:
    """Settlements pay to the configured destination, with P2TR change or none; a withdrawal does, too."""
    with Node(tmp_path / "node") as node:
        place = System(tmp_path / "system", node=node)
        address = new_address(node, destination)
        place.signer_file.write_text(
            place.signer_file.read_text() + f'[settlement]\ndestination_address = "{address}"\n'
        )
        script = decode_address(address, Network.REGTEST).hex()
        with place as system:
            customer, drained, mover = Customer(system, node), CustomerV2(system, node), Mover(system, node)
            with_change(customer, "p2tr").opened()
            drained.opened()
            mover.opened()
            assert drained.pay(FUNDING_SAT).status_code in (200, 202)
            assert customer.close(OPENING_SAT).status_code in (200, 202)
            paid, all_paid = settled(customer, drained)
            fee_sat = customer.record["settlement_fee"]
            assert paid == {customer.change_script.hex(): FUNDING_SAT - OPENING_SAT, script: OPENING_SAT - fee_sat}
            assert all_paid == {script: FUNDING_SAT - drained.record["settlement_fee"]}

            assert mover.pay(OPENING_SAT + 1).status_code == 200
            first = mover.outpoint
            mover.withdrawn()
            block = node.rpc("getblock", node.best, 2)
            (moved,) = (each for each in block["tx"] if each["vin"][0].get("txid") == first.txid_hex)
            assert moved["vout"][1]["scriptPubKey"]["hex"] == script


@pytest.mark.parametrize("kind", TYPES)
def test_the_node_relays_from_the_smallest_output_of_each_type(market_place: Market, kind: str) -> None:
    """Bitcoin Core's own policy refuses one satoshi less than `least_relayed_sat` as dust."""
    _, node = market_place
    coin = max(node.rpc("listunspent", wallet="miner"), key=lambda each: each["amount"])
    address = new_address(node, kind)
    least = least_relayed_sat(decode_address(address, Network.REGTEST))

    def verdict(sat: int) -> tuple[bool, str]:
        small = Decimal(sat).scaleb(-8)
        rest = coin["amount"] - small - Decimal("0.0001")
        outputs = [{address: f"{small:.8f}"}, {node.address(): f"{rest:.8f}"}]
        unsigned = node.rpc("createrawtransaction", [{"txid": coin["txid"], "vout": coin["vout"]}], outputs)
        signed = node.rpc("signrawtransactionwithwallet", unsigned, wallet="miner")["hex"]
        (answer,) = node.rpc("testmempoolaccept", [signed])
        return answer["allowed"], answer.get("reject-reason", "")

    assert verdict(least) == (True, "")
    allowed, reason = verdict(least - 1)
    assert (allowed, reason[:4]) == (False, "dust")


@pytest.mark.parametrize("kind", WITNESS_TYPES)
def test_fault_43_the_payer_names_an_address_of_each_type(payer: PayerAtTerminal, node: Node, kind: str) -> None:
    """`channel new --change-address`, pay, close: the node's wallet gets the change."""
    address = new_address(node, kind)
    name = payer.opened("--change-address", address)
    payer.run("pay", name, 10)
    payer.run("close", name)
    (txid,) = node.rpc("getrawmempool")
    node.mine()

    change = node.rpc("gettxout", txid, 0)
    assert change["scriptPubKey"]["address"] == address
    assert change["value"] * 100_000_000 == PAYER_FUNDING_SAT - payer.record(name)["open_price_sat"] - 10


@pytest.mark.parametrize("kind", WITNESS_TYPES)
def test_fault_43_a_refund_goes_to_each_type(payer: PayerAtTerminal, system: System, node: Node, kind: str) -> None:
    """The first refund pays to the change address, and a published one to any other; both are valid and mined."""
    home, other = new_address(node, kind), new_address(node, "p2tr" if kind != "p2tr" else "p2wpkh")
    name = payer.opened("--change-address", home, "--v1")
    system.kill_server()
    refused = payer.run("refund", name, "--to", REFUSED[0][0], *payer.own_node, status=1)
    assert "address of the live network; want a" in " ".join(refused.split())
    node.pass_median_time(payer.record(name)["expiry"])
    (first,) = payer.record(name)["refunds"]
    (answer,) = node.rpc("testmempoolaccept", [first])
    assert answer["allowed"], answer

    published = json.loads(payer.run("refund", name, "--publish", "--fee-rate", 3, "--json", *payer.own_node))
    again = json.loads(
        payer.run("refund", name, "--publish", "--fee-rate", 9, "--to", other, "--json", *payer.own_node)
    )

    assert node.rpc("getrawmempool") == [again["txid"]] != [published["txid"]]
    vsize = node.rpc("getmempoolentry", again["txid"])["vsize"]
    assert 9 * vsize <= again["fee_sat"] <= 9 * (vsize + 4)
    node.mine()
    refund = node.rpc("gettxout", again["txid"], 0)
    assert refund["scriptPubKey"]["address"] == other
    assert refund["value"] * 100_000_000 == PAYER_FUNDING_SAT - again["fee_sat"]


def test_fault_43_settle_offline_pays_each_type(tmp_path: Path) -> None:
    """Without the server, a backup and the signer settle channels with change of each witness type."""
    with market(tmp_path) as (system, node):
        customers = [with_change(Customer(system, node), kind) for kind in WITNESS_TYPES]
        for customer in customers:
            customer.opened()
        backup = disaster(system)

        answer = settled_offline(backup, system.server_file, "--publish", "--fee-rate", 5)

        assert len(answer["transactions"]) == len(customers)
        node.mine()
        for customer in customers:
            fate = next(each for each in answer["channels"] if each["channel"] == str(customer.outpoint))
            change = node.rpc("gettxout", fate["txid"], 0)
            assert change["scriptPubKey"]["hex"] == customer.change_script.hex()
            assert change["value"] * 100_000_000 == FUNDING_SAT - OPENING_SAT
            assert node.rpc("gettxout", OutPoint.parse(fate["txid"], 1).txid_hex, 1) is not None
