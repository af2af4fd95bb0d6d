"""RBPCP §6: the life of a v2 channel, in both dialects."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from bitcoin.core import CTransaction
from coincurve import PrivateKey

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.types import Network
from paychan.protocol.wire.rbpcp import Dialect, opening_secret
from tests.api.both_paths import BOTH_PATHS
from tests.lib.channels import scripts_of
from tests.lib.rbpcp import V2, Payer, path
from tests.lib.system import System

pytestmark = BOTH_PATHS

FUNDING_SAT = 12_345_678_900_000


def _result(dialect: Dialect, value: int, left: int) -> dict[str, object]:
    """Build the expected result of an open channel; S has "" where A has null (RBPCP §6.6)."""
    return {
        "channel_status": "open",
        "channel_value_left": left,
        "value_received": value,
        "settlement_txid": "" if dialect is Dialect.S else None,
        "application_data": "",
    }


def test_a_channel_is_opened_paid_and_closed(system: System, v2: V2) -> None:
    """Opening, a payment, its repeat, and a close each get an answer that clients of the dialect can parse."""
    payer = v2.payer
    opened = v2.open(payer.payment(100_000))
    assert (opened.status_code, opened.reason_phrase) == (201, "Channel ready")
    assert opened.json() == _result(v2.dialect, 100_000, FUNDING_SAT - 100_000)
    for value in (23_456, 0):
        paid = v2.pay(payer.payment(123_456))
        assert (paid.status_code, paid.reason_phrase) == (200, "Payment accepted")
        assert paid.json() == _result(v2.dialect, value, FUNDING_SAT - 123_456)
    closed = v2.close(payer.payment(150_000))
    assert (closed.status_code, closed.reason_phrase) == (200, "Channel closed")
    assert closed.json() == {
        "channel_status": "closed",
        "channel_value_left": 0,
        "value_received": 0,
        "settlement_txid": system.channel(payer.outpoint)["settlement_txid"],
        "application_data": "",
    }


@pytest.mark.parametrize("kind", ["p2wpkh", "p2wsh", "p2tr"])
def test_fault_43_change_may_go_to_a_witness_address(system: System, v2: V2, kind: str) -> None:
    """Open, pay, and close to another address of the type, named in upper case: the settlement pays there."""
    payer = v2.payer
    payer.change_script = scripts_of(payer.public_key)[kind]
    payer.change_address = encode_address(payer.change_script, Network.TEST)
    assert v2.open(payer.payment(100_000)).status_code == 201
    assert v2.pay(payer.payment(150_000)).status_code == 200
    last = scripts_of(PrivateKey().public_key.format())[kind]

    closed = v2.close(payer.payment(160_000, last), change_address=encode_address(last, Network.TEST).upper())

    assert closed.status_code == 200, closed.text
    raw = bytes.fromhex(system.channel(payer.outpoint)["settlement_transaction"])
    change = CTransaction.deserialize(raw).vout[0]
    assert (change.nValue, bytes(change.scriptPubKey)) == (FUNDING_SAT - 160_000, last)


def test_the_location_of_an_opening_is_usable_unchanged(v2: V2) -> None:
    """The `Location` of a 201 is the absolute URL of the channel with its secret."""
    first = v2.payer.payment(100_000)
    location = v2.open(first).headers["Location"]
    assert location == f"{v2.url}{path(v2.payer.outpoint)}?secret={opening_secret(first).hex()}"
    assert v2.http.put(location, content=v2.body(v2.payer.payment(110_000))).status_code == 200


@pytest.mark.parametrize("write", [str, str.upper, '"{}"'.format, lambda text: f"%22{text.upper()}%22"])
@pytest.mark.parametrize("internal", [False, True])
def test_url_and_secret_may_be_written_in_any_known_way(v2: V2, write: Callable[[str], str], internal: bool) -> None:
    """Both txid orders, quotes and upper case name the same channel, for opening, paying and closing."""
    payer, first = v2.payer, v2.payer.payment(100_000)
    outpoint = payer.outpoint.reversed if internal else payer.outpoint
    secret = write(opening_secret(first).hex())
    url = f"{v2.url}{path(outpoint)}"
    assert v2.http.post(f"{url}?secret={secret}", content=v2.opening_body(first)).status_code == 201
    paid = v2.http.put(f"{url}?secret={secret}", content=v2.body(payer.payment(110_000)))
    assert (paid.status_code, paid.json()["value_received"]) == (200, 10_000)
    closed = v2.http.put(f"{url}/close?secret={secret}", content=v2.body(payer.payment(130_000)))
    assert closed.status_code == 200


def test_a_drained_payment_settles_at_once(system: System, open_v2: V2) -> None:
    """Defect D9: a payment of everything is answered with the settlement, which pays all but the fee to the server."""
    drained = open_v2.pay(open_v2.payer.payment_of_change(0))
    result = drained.json()
    assert (drained.status_code, result["channel_status"], result["channel_value_left"]) == (200, "closed", 0)
    assert result["value_received"] == FUNDING_SAT - 100_000
    channel = system.channel(open_v2.payer.outpoint)
    assert result["settlement_txid"] == channel["settlement_txid"]
    settlement = _settlement(system, open_v2.payer)
    assert [output.nValue for output in settlement.vout] == [FUNDING_SAT - channel["settlement_fee"]]


def test_an_opening_payment_of_everything_settles_at_once(system: System, v2: V2) -> None:
    """An opening payment without change opens the channel and settles it."""
    opened = v2.open(v2.payer.payment_of_change(0))
    assert (opened.status_code, opened.json()["channel_status"]) == (201, "closed")
    assert opened.json()["settlement_txid"] == system.channel(v2.payer.outpoint)["settlement_txid"]


def test_a_close_may_name_a_new_change_address_and_a_fee(system: System, open_v2: V2) -> None:
    """The settlement pays the client's change to the new address, and at least the offered fee."""
    fresh = key_script(Payer().public_key)
    payment = open_v2.payer.payment(100_000 + 50_000, fresh)
    assert open_v2.close(payment, change_address=encode_address(fresh, Network.TEST)).status_code == 200
    settlement = _settlement(system, open_v2.payer)
    assert (settlement.vout[0].nValue, bytes(settlement.vout[0].scriptPubKey)) == (FUNDING_SAT - 150_000, fresh)
    fee = FUNDING_SAT - sum(output.nValue for output in settlement.vout)
    assert fee == system.channel(open_v2.payer.outpoint)["settlement_fee"]
    assert 50_000 <= fee < 150_000


def test_a_close_without_a_change_address_keeps_the_old_one(system: System, open_v2: V2) -> None:
    """A compact body has no address; if a close adds no value, the server pays the fee."""
    body = open_v2.body(open_v2.payer.payment(100_000), change_address=None)
    assert open_v2.http.put(open_v2.resource("/close"), content=body).status_code == 200
    settlement = _settlement(system, open_v2.payer)
    assert bytes(settlement.vout[0].scriptPubKey) == open_v2.payer.change_script
    assert settlement.vout[0].nValue == FUNDING_SAT - 100_000


def test_a_close_may_pay_everything(system: System, open_v2: V2) -> None:
    """A closing payment with change 0 leaves no output for the client; the added value is the fee."""
    assert open_v2.pay(open_v2.payer.payment_of_change(1_000)).status_code == 200
    assert open_v2.close(open_v2.payer.payment_of_change(0)).status_code == 200
    assert len(_settlement(system, open_v2.payer).vout) == 1


def test_a_second_close_returns_the_stored_result(open_v2: V2) -> None:
    """Defect D11: another close with any payment gets the same txid and changes nothing."""
    first = open_v2.close(open_v2.payer.payment(120_000))
    for payment in (open_v2.payer.payment(120_000), open_v2.payer.payment(900_000)):
        again = open_v2.close(payment)
        assert (again.status_code, again.json()) == (200, first.json())


def test_a_channel_is_judged_by_the_terms_of_its_address_alone(system: System, v2: V2) -> None:
    """The change address may be the funding address, as in the document, or any other of the network."""
    payer = v2.payer
    payment = payer.payment(100_000, payer.terms.funding_script)
    opened = v2.open(payment, change_address=payer.terms.funding_address(Network.TEST))
    assert opened.status_code == 201
    assert system.channel(payer.outpoint)["value_received"] == 100_000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", None])
def test_the_content_type_of_a_request_does_not_matter(v2: V2, kind: str | None) -> None:
    """RBPCP §6.7: a JSON body is read with any Content-Type, also with that of a form."""
    headers = {} if kind is None else {"Content-Type": kind}
    payments = (v2.payer.payment(100_000), v2.payer.payment(120_000), v2.payer.payment(150_000))
    v2.secret = opening_secret(payments[0]).hex()
    opened = v2.http.post(v2.resource(), content=v2.opening_body(payments[0]), headers=headers)
    paid = v2.http.put(v2.resource(), content=v2.body(payments[1]), headers=headers)
    closed = v2.http.put(v2.resource("/close"), content=v2.body(payments[2]), headers=headers)
    assert [answer.status_code for answer in (opened, paid, closed)] == [201, 200, 200]


@pytest.mark.parametrize("data", ["", "hello", "\u00fc\U0001f600", '\\"\n\u0000', "payment_data", "x" * 2000])
def test_application_data_is_accepted_without_an_application(open_v2: V2, data: str) -> None:
    """Any application data is accepted; without an application the answer has an empty text."""
    body = open_v2.body(open_v2.payer.payment(120_000), data)
    paid = open_v2.http.put(open_v2.resource(), content=body)
    assert (paid.status_code, paid.json()["application_data"]) == (200, "")


def test_the_two_dialects_may_be_mixed(v2: V2) -> None:
    """One parser accepts bare and wrapped bodies, and the flag in the signature, in a field, or in both."""
    first = v2.payer.payment(100_000)
    bare = json.loads(v2.opening_body(first))
    bare = bare.get("payment_data", bare)
    both = bare | {"signature_data": first.signature_with_flag.hex(), "sighash_flag": "83", "unknown": [1, {"a": None}]}
    v2.secret = opening_secret(first).hex()
    opened = v2.http.post(v2.resource(), json={"payment_data": both, "more": 1})
    assert (opened.status_code, opened.json()["settlement_txid"]) == (201, None)
    second = v2.payer.payment(110_000)
    compact = {"signature_data": second.signature_with_flag.hex(), "change_value": second.change_sat}
    paid = v2.http.put(v2.resource(), json=compact)
    assert (paid.status_code, paid.json()["settlement_txid"]) == (200, "")


def _settlement(system: System, payer: Payer) -> CTransaction:
    return CTransaction.deserialize(bytes.fromhex(system.channel(payer.outpoint)["settlement_transaction"]))
