"""Every kind of settlement that the server makes is one that a real node takes and mines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bitcoin.core import CTransaction

from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, market
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("settlement")) as place:
        yield place


def close_by_payer(customer: Customer) -> None:
    assert customer.close(OPENING_SAT).status_code in (200, 202)


def close_by_operator(customer: Customer) -> None:
    path = f"/channels/{customer.outpoint.txid_hex}/{customer.outpoint.vout}/close"
    assert customer.system.manage("POST", path).status_code == 200


def leave_least_change(customer: Customer) -> None:
    """700 sat is the configured dust limit, 546 sat the network's."""
    assert customer.pay(FUNDING_SAT - 700).status_code == 200
    close_by_operator(customer)


def drain(customer: Customer) -> None:
    assert customer.pay(FUNDING_SAT).status_code in (200, 202)


ENDINGS = {close_by_payer: OPENING_SAT, close_by_operator: OPENING_SAT, leave_least_change: FUNDING_SAT - 700}


@pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])
@pytest.mark.parametrize("ending", [close_by_payer, close_by_operator, leave_least_change, drain])
def test_threat_13_19_every_settlement_is_standard_and_pays_what_is_owed(
    market_place: Market, kind: type[Customer], ending: object
) -> None:
    """The node's mempool takes it by its own policy, its fee is the one stored, and a block confirms it."""
    system, node = market_place
    customer = kind(system, node)
    customer.opened()
    assert callable(ending)
    ending(customer)

    record = customer.record
    (txid,) = node.rpc("getrawmempool")
    assert txid == record["settlement_txid"]
    entry = node.rpc("getmempoolentry", txid)
    assert int(entry["fees"]["base"] * 100_000_000) == record["settlement_fee"] >= entry["vsize"]
    paid_sat = ENDINGS.get(ending, FUNDING_SAT)
    outputs = [out.nValue for out in CTransaction.deserialize(bytes.fromhex(record["settlement_transaction"])).vout]
    assert outputs == [value for value in (FUNDING_SAT - paid_sat, paid_sat - record["settlement_fee"]) if value]
    node.mine(2)
    customer.ends("closed")
