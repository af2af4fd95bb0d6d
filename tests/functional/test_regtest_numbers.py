"""Numbers at their limits on a real chain: expiries at every threshold (threat 7), amounts of all sizes (threat 40)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from paychan.protocol.expiry import MAX_EXPIRY, MIN_EXPIRY
from paychan.protocol.kinds.p2sh import SINGLE_ANYONECANPAY, encode_script_number
from paychan.protocol.payment import Payment, sign_payment
from paychan.protocol.types import MAX_MONEY_SAT, Sat, UnixTime
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, code, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

YEAR_2038 = 1 << 31
"""The first time whose script number needs a fifth byte: with four bytes it would be negative."""

PAID_SAT = OPENING_SAT + 1000

both_versions = pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    sections = {"open": "max_duration_hours = 0"}  # no limit: expiries of every size
    with market(tmp_path_factory.mktemp("numbers"), sections) as place:
        yield place


# --- threat 7: heights and times -----------------------------------------------------------------------------------


@both_versions
@pytest.mark.parametrize(
    ("expiry", "pushed"),
    [(YEAR_2038 - 1, "04ffffff7f"), (YEAR_2038, "050000008000"), (MAX_EXPIRY, "05ffffffff00")],
    ids=["2^31-1", "2^31", "2^32-1"],
)
def test_threat_7_a_far_expiry_is_funded_opened_settled_and_mined(
    market_place: Market, kind: type[Customer], expiry: int, pushed: str
) -> None:
    """Minimal pushes of four and five bytes: the node accepts the settlement, and a block pays both sides."""
    customer = kind(*market_place, expiry=expiry)
    assert customer.terms.redeem_script[37:-38].hex() == pushed
    customer.opened()
    assert customer.record["expires"] == expiry
    assert customer.pay(PAID_SAT).status_code == 200
    assert customer.close(PAID_SAT).status_code in (200, 202)

    (mined,) = settled(customer)
    assert mined[customer.change_script.hex()] == FUNDING_SAT - PAID_SAT
    assert customer.terms.redeem_script.hex() in customer.record["settlement_transaction"]


def test_threat_7_the_first_time_is_refused_as_long_past(market_place: Market) -> None:
    """500,000,000 is a time in 1985: neither version gives out an address for it."""
    system, node = market_place
    key = Customer(system, node).query["client_pubkey"]
    for path, query in (
        ("/v1/fundingInfo", {"client_pubkey": key, "exp_time": str(MIN_EXPIRY)}),
        (f"/v2/funding/{MIN_EXPIRY}/{key}/info", {}),
    ):
        refused = httpx.get(system.url + path, params=query, timeout=30, verify=False)
        assert code(refused) == (400, "expiry_too_soon")
        assert refused.json()["got_unix"] == MIN_EXPIRY < node.median_time < refused.json()["need_unix"]


@pytest.mark.parametrize("number", [1, MIN_EXPIRY - 1, MAX_EXPIRY + 1], ids=["1", "499999999", "2^32"])
def test_threat_7_numbers_that_are_no_time_are_refused(market_place: Market, number: int) -> None:
    """No address for a block height or for 33 bits; a channel funded nevertheless does not open."""
    system, node = market_place
    customer = CustomerV2(system, node)
    key, text = customer.query["client_pubkey"], f"got {number}, need {MIN_EXPIRY} to {MAX_EXPIRY}"
    script = with_number(customer, encode_script_number(number))
    customer.fund_odd(script)
    node.mine()
    v1 = customer.query | {"exp_time": str(number)}
    answers = [
        customer.ask("GET", "/v1/fundingInfo", **v1),
        customer.ask("GET", f"/v2/funding/{number}/{key}/info"),
        customer.ask("GET", f"/v2/funding/{number}/{key}/outputs"),
        customer.ask("POST", "/v1/channels/new", **v1, change_address=customer.change_address, payment="AAAA"),
    ]
    assert [code(each) for each in answers] == [(400, "expiry_not_a_time")] * 4
    assert all(text in each.json()["error"] for each in answers)

    refused = customer.open()
    is_template = len(script) in (80, 81)
    assert code(refused) == (400, "expiry_not_a_time" if is_template else "malformed")
    assert not is_template or text in refused.json()["error"]
    assert not has_channel(customer)


@pytest.mark.parametrize(
    "pushed",
    [b"\x00\x00\x00\x80", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f\x00"],
    ids=["2^31 in four bytes, as two1 wrote it", "2^32-1 in four bytes", "2^31-1 in five bytes"],
)
def test_threat_7_a_number_that_is_not_minimal_opens_nothing(market_place: Market, pushed: bytes) -> None:
    """Negative or padded script numbers: their refunds would never be valid, so the server does not open such a script."""
    system, node = market_place
    customer = CustomerV2(system, node)
    customer.fund_odd(with_number(customer, pushed))
    node.mine()
    assert code(customer.open()) == (400, "malformed")


def with_number(customer: Customer, pushed: bytes) -> bytes:
    """Build the customer's redeem script with other bytes in place of the expiry."""
    script = customer.terms.redeem_script
    return script[:37] + bytes([len(pushed)]) + pushed + script[-38:]


# --- threat 40: amounts --------------------------------------------------------------------------------------------

IMPOSSIBLE = [MAX_MONEY_SAT + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - FUNDING_SAT, (1 << 64) - 1]
"""The last three are negative if read as signed numbers."""

NO_AMOUNTS = [-1, -FUNDING_SAT, -(1 << 63), 1 << 64, 10**30, 899_000.5, 899e3, "899000", None, True, [899_000]]
"""JSON values that are no amount in satoshi."""


def signed(customer: Customer, change_sat: int) -> Payment:
    """A payment that is really signed for an arbitrary 64-bit change value."""
    bits = Sat(change_sat % (1 << 64))
    made = sign_payment(customer.key, customer.terms, customer.outpoint, FUNDING_SAT, customer.change_script, bits)
    return Payment(Sat(change_sat), made.signature, SINGLE_ANYONECANPAY)


def refuse_all(customer: Customer, send: Callable[[Payment], httpx.Response], most_sat: int) -> None:
    """Each is refused: more than the funding with both numbers, impossible values with the range."""
    for change_sat in (most_sat + 1, FUNDING_SAT + 1, MAX_MONEY_SAT):
        refused = send(signed(customer, change_sat))
        assert code(refused) in [(400, "value_backwards"), (400, "not_newest_payment")]
        assert (refused.json()["got_sat"], refused.json()["need_sat"]) == (change_sat, most_sat)
    for change_sat in IMPOSSIBLE:
        refused = send(signed(customer, change_sat))
        assert code(refused) == (400, "malformed")
        assert f"got {change_sat} sat, want 0 to {MAX_MONEY_SAT} sat" in refused.json()["error"]


@both_versions
def test_threat_40_no_amount_beyond_the_funding_counts(market_place: Market, kind: type[Customer]) -> None:
    """Above the funding, above all bitcoins, 2^63 and up: opens, pays and closes nothing; other payments continue."""
    _, node = market_place
    customer = kind(*market_place)
    customer.fund()
    node.mine()
    refuse_all(customer, customer.open_with, FUNDING_SAT)
    wait_for(lambda: customer.open().status_code == 201, "opened")
    before = customer.record
    refuse_all(customer, customer.pay_with, FUNDING_SAT - OPENING_SAT)
    refuse_all(customer, customer.close_with, FUNDING_SAT - OPENING_SAT)
    assert customer.record == before

    assert customer.pay(PAID_SAT).status_code == 200
    assert customer.close(PAID_SAT).status_code in (200, 202)
    (mined,) = settled(customer)
    assert mined[customer.change_script.hex()] == FUNDING_SAT - PAID_SAT
    assert sum(mined.values()) + customer.record["settlement_fee"] == FUNDING_SAT


def test_threat_40_values_that_are_no_amount_change_nothing(market_place: Market) -> None:
    """Negative, beyond 64 bits, fractions, texts: refused in openings, payments and closings of version 2."""
    system, node = market_place
    newcomer, customer = CustomerV2(system, node), CustomerV2(system, node)
    newcomer.fund()
    customer.opened()
    before = customer.record
    for amount in NO_AMOUNTS:
        bits = amount if isinstance(amount, int) else 899_000
        opening = newcomer.opening(signed(newcomer, bits)) | {"change_value": amount}
        signature = signed(customer, bits).signature_with_flag.hex()
        paying = {"payment_data": {"signature_data": signature, "change_value": amount}}
        answers = [
            newcomer.ask("POST", newcomer.path, dumped(opening), secret="00" * 32),
            customer.ask("PUT", customer.path, dumped(paying), secret=customer.secret),
            customer.ask("PUT", f"{customer.path}/close", dumped(paying), secret=customer.secret),
        ]
        assert [code(each) for each in answers] == [(400, "malformed")] * 3, amount
        assert all("change_value" in each.json()["error"] for each in answers), amount
    assert customer.record == before
    assert not has_channel(newcomer)


def has_channel(customer: Customer) -> bool:
    path = f"/channels/{customer.outpoint.txid_hex}/{customer.outpoint.vout}"
    return customer.system.manage("GET", path).status_code == 200


def dumped(body: dict[str, Any]) -> bytes:
    """Encode with Python's JSON: the project's encoder writes no such numbers."""
    return json.dumps(body).encode()


# --- later times: these tests run last --------------------------------------------------------------------------------


def test_threat_7_after_2038_channels_settle_and_refunds_are_valid(market_place: Market) -> None:
    """The chain's time has 32 bits: a channel of 2^31 closes by itself before then, and a refund is mined after."""
    system, node = market_place
    served = CustomerV2(system, node, expiry=YEAR_2038)
    served.opened()
    alone = Customer(system, node, expiry=YEAR_2038)
    alone.fund()
    node.pass_median_time(YEAR_2038 - 6 * 3600)
    assert served.record["value_received"] == OPENING_SAT
    (mined,) = settled(served)
    assert served.record["close_reason"] == "expiry"
    assert mined[served.change_script.hex()] == FUNDING_SAT - OPENING_SAT

    refund = alone.refund().transaction
    assert not node.rpc("testmempoolaccept", [refund.hex()])[0]["allowed"]
    node.pass_median_time(YEAR_2038)
    txid = node.send_raw(refund)
    (block,) = node.mine()
    assert txid in node.rpc("getblock", block)["tx"]
    assert UnixTime(node.median_time) > YEAR_2038
