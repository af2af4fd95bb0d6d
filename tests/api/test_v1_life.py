"""RBPCP §5: the life of a v1 channel, for a client that follows `Location` and reads reason phrases."""

from __future__ import annotations

import httpx
import pytest

from paychan.protocol.payment import encode_v1
from paychan.protocol.types import Network
from tests.api.both_paths import BOTH_PATHS
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import DEBUG_SERVER_KEY, System

pytestmark = BOTH_PATHS

FUNDING_SAT = 12_345_678_900_000


def _opened_by_location(url: str, payer: Payer, http: httpx.Client) -> str:
    """Get funding info, open a channel at its `Location`, and return the `Location` of the channel."""
    info = http.get(f"{url}/v1/fundingInfo?client_pubkey={payer.public_key.hex()}&exp_time={payer.expiry}")
    assert (info.status_code, info.json()["server_pubkey"]) == (200, DEBUG_SERVER_KEY)
    first = encode_v1(payer.payment(info.json()["open_price"]))
    opened = http.post(f"{info.headers['Location']}&change_address={payer.change_address}&payment={first}&test=true")
    assert (opened.status_code, opened.reason_phrase) == (201, "Channel ready")
    return opened.headers["Location"]


def test_a_client_that_follows_locations_opens_pays_and_drains(system: System, http: httpx.Client) -> None:
    """Terms, opening, payments, a repeat and a draining payment need only `Location` and reason phrase."""
    payer = Payer()
    channel = _opened_by_location(system.url, payer, http)
    for value in (16_760, 0):
        paid = http.put(f"{channel}?payment={encode_v1(payer.payment(100_000))}")
        assert (paid.status_code, paid.reason_phrase) == (200, "Payment accepted")
        assert paid.json() == {
            "channel_status": "open",
            "channel_value_left": FUNDING_SAT - 100_000,
            "value_received": value,
            "settlement_txid": None,
        }
    drained = http.put(f"{channel}?payment={encode_v1(payer.payment_of_change(0))}")
    assert (drained.status_code, drained.reason_phrase) == (202, "Payment accepted")
    result = drained.json()
    assert (result["channel_status"], result["channel_value_left"]) == ("closed", 0)
    assert result["value_received"] == FUNDING_SAT - 100_000
    assert result["settlement_txid"] == system.channel(payer.outpoint)["settlement_txid"]


def test_a_client_that_follows_locations_opens_pays_and_closes(system: System, http: httpx.Client) -> None:
    """DELETE with the newest payment closes with 202 and the settlement's txid; a repeat has the same answer."""
    payer = Payer()
    channel = _opened_by_location(system.url, payer, http)
    newest = encode_v1(payer.payment(2_000_000))
    assert http.put(f"{channel}?payment={newest}").status_code == 200
    closed = http.delete(f"{channel}?payment={newest}")
    assert (closed.status_code, closed.reason_phrase) == (202, "Channel closed")
    assert closed.json() == {
        "channel_status": "closed",
        "channel_value_left": FUNDING_SAT - 2_000_000,
        "value_received": 0,
        "settlement_txid": system.channel(payer.outpoint)["settlement_txid"],
    }
    again = http.delete(f"{channel}?payment={newest}")
    assert (again.status_code, again.reason_phrase, again.json()) == (202, "Channel closed", closed.json())


def test_funding_info_names_the_terms(v1: V1) -> None:
    """The answer of fundingInfo has exactly the published keys, and the address for its keys and expiry."""
    info = v1.funding_info()
    assert info.headers["Content-Type"] == "application/json"
    assert info.json() == {
        "server_pubkey": DEBUG_SERVER_KEY,
        "funding_address_copy": v1.payer.terms.funding_address(Network.TEST),
        "open_price": 83_240,
        "funding_tx_min_conf": 6,
        "settlement_period_hours": 6,
    }


@pytest.mark.parametrize("test", ["undefined", "true", "false", "", "%00%ff", "1"])
def test_the_parameter_test_is_ignored(v1: V1, http: httpx.Client, test: str) -> None:
    """Old clients send `test` with any value, also `undefined`: it changes nothing."""
    opened = http.post(f"{v1.opening_url(v1.payer.payment(100_000))}&test={test}")
    assert opened.status_code == 201


def test_the_answer_to_an_opening_describes_the_channel(v1: V1) -> None:
    """201 has the result of the opening payment, and `Location` names the resource without `/pay`."""
    opened = v1.open(v1.payer.payment(83_240))
    assert (opened.status_code, opened.headers["Location"]) == (201, v1.resource)
    assert opened.json() == {
        "channel_status": "open",
        "channel_value_left": FUNDING_SAT - 83_240,
        "value_received": 83_240,
        "settlement_txid": None,
    }


def test_an_opening_payment_of_everything_settles_at_once(system: System, v1: V1) -> None:
    """Defect D6: a draining opening payment answers 202 with `Location` and the settlement's txid."""
    opened = v1.open(v1.payer.payment_of_change(0))
    assert (opened.status_code, opened.headers["Location"]) == (202, v1.resource)
    result = opened.json()
    assert (result["channel_status"], result["channel_value_left"]) == ("closed", 0)
    assert result["value_received"] == FUNDING_SAT
    assert result["settlement_txid"] == system.channel(v1.payer.outpoint)["settlement_txid"]


def test_the_pay_alias_pays(open_v1: V1) -> None:
    """Payments work with the path of August 2016, which ends with `/pay`, and without `/pay`."""
    paid = open_v1.pay(open_v1.payer.payment(150_000), tail="/pay")
    assert (paid.status_code, paid.json()["value_received"]) == (200, 50_000)


@pytest.mark.parametrize("address", ["mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY", "nonsense", ""])
def test_a_change_address_on_a_payment_is_ignored(open_v1: V1, address: str) -> None:
    """RBPCP §5.3: a `change_address` on PUT, also a malformed one, changes nothing."""
    assert open_v1.pay(open_v1.payer.payment(150_000), change_address=address).status_code == 200


def test_a_body_is_ignored_with_any_content_type(open_v1: V1) -> None:
    """v1 uses no body: a form and a malformed body change nothing."""
    payment = encode_v1(open_v1.payer.payment(150_000))
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data; boundary=x", "?"):
        answer = open_v1.http.put(
            f"{open_v1.resource}?payment={payment}", content=b"payment=AAAA", headers={"Content-Type": kind}
        )
        assert answer.status_code == 200, kind
