"""A real node accepts and mines every kind of settlement that the server makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bitcoin.core import CTransaction

from paychan.protocol.address import encode_address, p2sh_script
from paychan.protocol.types import Network
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, code, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

DUST_SAT = 700
"""channel.dust_limit_sat"""

PRICES_SAT = {Customer: 70_000 + 40 * 331, CustomerV2: 100_000}
"""open.base_price_sat plus the fee of a settlement of typical size; open.v2_price_sat."""


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
    """More than the network's 546 sat."""
    assert customer.pay(FUNDING_SAT - DUST_SAT).status_code == 200
    close_by_operator(customer)


def drain(customer: Customer) -> None:
    assert customer.pay(FUNDING_SAT).status_code in (200, 202)


ENDINGS = {close_by_payer: OPENING_SAT, close_by_operator: OPENING_SAT, leave_least_change: FUNDING_SAT - DUST_SAT}


@pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])
@pytest.mark.parametrize("ending", [close_by_payer, close_by_operator, leave_least_change, drain])
def test_threat_13_19_every_settlement_is_standard_and_pays_what_is_owed(
    market_place: Market, kind: type[Customer], ending: object
) -> None:
    """The node's mempool accepts it by its own policy, its fee equals the stored one, and a block confirms it."""
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


@pytest.mark.parametrize("change", ["p2pkh", "p2sh"])
@pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])
def test_threat_13_one_satoshi_on_either_side_of_each_limit(
    market_place: Market, kind: type[Customer], change: str
) -> None:
    """Minimum first payment and minimum change, for both change scripts: one less is refused, the minimum is mined."""
    system, node = market_place
    customer = kind(system, node)
    if change == "p2sh":
        customer.change_script = p2sh_script(b"\x51")
        customer.change_address = encode_address(customer.change_script, Network.REGTEST)
    customer.fund()
    node.mine()
    price_sat = PRICES_SAT[kind]
    short = customer.open(price_sat - 1)
    assert (code(short), short.json()["need_sat"]) == ((400, "payment_short"), price_sat)
    wait_for(lambda: customer.open(price_sat).status_code == 201, "opened")
    for change_sat in (1, DUST_SAT - 1):
        dust = customer.pay(FUNDING_SAT - change_sat)
        assert (code(dust), dust.json()["got_sat"], dust.json()["need_sat"]) == (
            (400, "dust_change"),
            change_sat,
            DUST_SAT,
        )
    assert customer.pay(FUNDING_SAT - DUST_SAT).status_code == 200
    close_by_operator(customer)
    (mined,) = settled(customer)
    assert mined[customer.change_script.hex()] == DUST_SAT
