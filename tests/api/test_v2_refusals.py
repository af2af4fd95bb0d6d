"""RBPCP §6.2 to §6.5: the refusals of v2 with the right secret."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from paychan.protocol.address import encode_address
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import sign_payment
from paychan.protocol.types import Network, Sat
from paychan.protocol.wire.rbpcp import opening_secret
from tests.api.both_paths import BOTH_PATHS
from tests.lib.ecdsa import high_s_twin
from tests.lib.rbpcp import V1, V2, Payer, path, refusal
from tests.lib.system import System

LIVE_ADDRESS = "1M8iwBs5XD7ZJQJCDC7BdLEpSivRQZJ2Hg"


@pytest.mark.parametrize("name", ["redeem_script", "funding_txid", "funding_vout", "change_address"])
def test_opening_needs_every_field(v2: V2, system: System, name: str) -> None:
    """Script, outpoint and change address are mandatory on opening."""
    refused = v2.open(v2.payer.payment(100_000), **{name: None})
    assert (refusal(refused), refused.json()["field"]) == ((400, "missing"), name)
    assert "funding_value" not in system.channel(v2.payer.outpoint)


def _script_cases(payer: Payer) -> dict[str, tuple[str, str]]:
    good = payer.terms.redeem_script
    stranger = Payer().public_key
    return {
        "another server key": (
            make_terms(stranger, payer.public_key, payer.expiry).redeem_script.hex(),
            "wrong_server_key",
        ),
        "another client key": (
            make_terms(payer.terms.server_key, stranger, payer.expiry).redeem_script.hex(),
            "bad_signature",
        ),
        "one key for both": (good.replace(payer.public_key, payer.terms.server_key).hex(), "key_reuse"),
        "a block height": (_script_at_height(payer), "expiry_not_a_time"),
        "expiry not minimal": (
            good.replace(b"\x67\x04", b"\x67\x05").replace(b"\xb1\x75", b"\x00\xb1\x75").hex(),
            "malformed",
        ),
        "another opcode": (good.replace(b"\xb1\x75\x68", b"\xb2\x75\x68").hex(), "malformed"),
        "a byte more": (good.hex() + "00", "malformed"),
        "a byte less": (good.hex()[:-2], "malformed"),
        "with its length": ("50" + good.hex(), "malformed"),
        "empty": ("", "malformed"),
        "upper case": (good.hex().upper(), "malformed"),
        "half a byte": (good.hex() + "0", "malformed"),
        "uncompressed key": (good.hex()[:4] + "04" + good.hex()[6:], "malformed"),
    }


def _script_at_height(payer: Payer) -> str:
    """Build the script with 499,999,999 as expiry, which consensus reads as a block height."""
    good, at = payer.terms.redeem_script, payer.expiry.to_bytes(4, "little")
    return good.replace(at, (499_999_999).to_bytes(4, "little")).hex()


@pytest.mark.parametrize("kind", list(_script_cases(Payer())))
def test_opening_refuses_any_other_script(v2: V2, system: System, kind: str) -> None:
    """Only the template with the server's key for client and expiry, to which the outpoint pays, opens a channel."""
    script, code = _script_cases(v2.payer)[kind]
    assert refusal(v2.open(v2.payer.payment(100_000), redeem_script=script)) == (400, code)
    assert "funding_value" not in system.channel(v2.payer.outpoint)


def test_opening_refuses_a_near_expiry(system: System, v2: V2) -> None:
    """Defect D19: the minimum duration is also checked at opening."""
    near = V2(system.url, Payer(1_700_000_000), v2.http, v2.dialect)
    assert refusal(near.open(near.payer.payment(100_000))) == (400, "expiry_too_soon")


def test_opening_refuses_an_output_that_does_not_fund_it(v2: V2) -> None:
    """An outpoint that the server's chain backend does not list for this script is 400."""
    payer, outpoint = v2.payer, msgspec.structs.replace(v2.payer.outpoint, vout=v2.payer.outpoint.vout + 1)
    first = sign_payment(
        payer.key, payer.terms, outpoint, DEBUG_FUNDING_SAT, payer.change_script, Sat(DEBUG_FUNDING_SAT - 100_000)
    )
    url = f"{v2.url}{path(outpoint)}?secret={opening_secret(first).hex()}"
    refused = v2.http.post(url, content=v2.opening_body(first, funding_vout=outpoint.vout))
    assert refusal(refused) == (400, "funding_not_found")


@pytest.mark.parametrize("name", ["funding_txid", "funding_vout"])
def test_opening_refuses_a_body_that_names_another_outpoint(v2: V2, name: str) -> None:
    """RBPCP §6.5: URL and body must name the same output; there is no redirect."""
    other = {"funding_txid": "11" * 32, "funding_vout": v2.payer.outpoint.vout + 1}[name]
    refused = v2.open(v2.payer.payment(100_000), **{name: other})
    assert refusal(refused) == (400, "outpoint_mismatch")
    assert "Location" not in refused.headers


@pytest.mark.parametrize(
    "address", [LIVE_ADDRESS, "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "", "nonsense", "1" * 2000]
)
def test_opening_refuses_addresses_of_other_networks(v2: V2, address: str) -> None:
    """The change address is of the server's network; the refusal names the types that are taken, and the network."""
    answer = v2.open(v2.payer.payment(100_000), change_address=address)

    assert refusal(answer) == (400, "malformed")
    assert "want a P2PKH, P2SH, P2WPKH, P2WSH or P2TR address of the test network" in answer.text


def test_an_opening_payment_below_the_price_is_short(v2: V2) -> None:
    """The opening payment must be at least the v2 price."""
    assert refusal(v2.open(v2.payer.payment(99_999))) == (400, "payment_short")
    assert v2.open(v2.payer.payment(100_001)).status_code == 201


def test_the_outpoint_of_a_channel_is_in_use(open_v2: V2) -> None:
    """A second opening is 409 with the `Location` of the channel, without its secret."""
    again = open_v2.open(open_v2.payer.payment(200_000))
    assert refusal(again) == (409, "channel_exists")
    assert again.headers["Location"] == f"{open_v2.url}{path(open_v2.payer.outpoint)}"


def test_threat_4_the_outpoint_of_a_settled_channel_is_never_reused(open_v2: V2) -> None:
    """Opening at the outpoint of a settled channel is 409 without `Location`."""
    assert open_v2.close(open_v2.payer.payment(120_000)).status_code == 200
    again = open_v2.open(open_v2.payer.payment(200_000))
    assert (refusal(again), "Location" in again.headers) == ((409, "outpoint_used"), False)


@BOTH_PATHS
def test_a_closed_channel_accepts_no_payment(open_v2: V2) -> None:
    """Paying after the close is 410 with the settlement's txid."""
    txid = open_v2.close(open_v2.payer.payment(120_000)).json()["settlement_txid"]
    refused = open_v2.pay(open_v2.payer.payment(200_000))
    assert (refusal(refused), refused.json()["txid"]) == ((410, "channel_closed"), txid)


@pytest.mark.parametrize("tail", ["", "/close"])
@pytest.mark.parametrize("name", ["another key", "back", "dust", "flag", "0x83 without change", "high S", "address"])
@BOTH_PATHS
def test_bad_payments_neither_pay_nor_close(open_v2: V2, system: System, tail: str, name: str) -> None:
    """A payment that is invalid for its value, flag or address is 400 and changes nothing."""
    payer = open_v2.payer
    good, stranger = payer.payment(120_000), Payer()
    replace = msgspec.structs.replace
    payment, code = {
        "another key": (replace(good, signature=stranger.payment(120_000).signature), "bad_signature"),
        "back": (payer.payment(99_999), "value_backwards"),
        "dust": (payer.payment_of_change(1), "dust_change"),
        "flag": (replace(good, flag=0x81), "bad_flag"),
        "0x83 without change": (replace(payer.payment_of_change(0), flag=0x83), "flag_mismatch"),
        "high S": (replace(good, signature=high_s_twin(good.signature)), "signature_encoding"),
        "address": (payer.payment(120_000, stranger.change_script), "bad_signature"),
    }[name]
    before = system.channel(payer.outpoint)
    refused = open_v2.http.put(open_v2.resource(tail), content=open_v2.body(payment))
    assert refusal(refused) == (400, code)
    assert system.channel(payer.outpoint) == before


@pytest.mark.parametrize("tail", ["", "/close"])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"funding_txid": "11" * 32, "funding_vout": 0}, "outpoint_mismatch"),
        ({"funding_vout": 0, "funding_txid": None}, "missing"),
        ({"funding_vout": None, "funding_txid": "11" * 32}, "missing"),
        ({"redeem_script": "00"}, "malformed"),
        ({"redeem_script": Payer().terms.redeem_script.hex()}, "malformed"),
        ({"change_address": LIVE_ADDRESS}, "malformed"),
    ],
)
@BOTH_PATHS
def test_opening_fields_in_a_payment_must_match(
    open_v2: V2, system: System, tail: str, changes: dict[str, Any], code: str
) -> None:
    """A body's fields that repeat the opening must match the channel (RBPCP §4.4)."""
    before = system.channel(open_v2.payer.outpoint)
    body = open_v2.body(open_v2.payer.payment(120_000), **changes)
    assert refusal(open_v2.http.put(open_v2.resource(tail), content=body)) == (400, code)
    assert system.channel(open_v2.payer.outpoint) == before


@BOTH_PATHS
def test_a_payment_may_repeat_the_change_address_but_not_replace_it(open_v2: V2) -> None:
    """Only a close may name another change address."""
    payer, other = open_v2.payer, Payer()
    payment = payer.payment(120_000, other.change_script)
    assert refusal(open_v2.pay(payment, change_address=other.change_address)) == (400, "malformed")
    assert open_v2.pay(payer.payment(120_000), change_address=payer.change_address).status_code == 200


def test_a_close_is_judged_with_the_address_it_names(open_v2: V2, system: System) -> None:
    """A signature for the old address does not close to a new one, and vice versa."""
    payer, fresh = open_v2.payer, Payer()
    address = encode_address(fresh.change_script, Network.TEST)
    assert refusal(open_v2.close(payer.payment(120_000), change_address=address)) == (400, "bad_signature")
    assert system.channel(payer.outpoint)["status"] == "open"


@BOTH_PATHS
def test_the_path_of_one_version_is_unknown_in_the_other(system: System, open_v1: V1, v2: V2) -> None:
    """A v1 channel is 404 under /v2 with any secret, and a v2 channel is 404 under /v1 with a valid payment."""
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    as_v1 = V1(system.url, v2.payer, v2.http)
    newest = v2.payer.payment(100_000)
    for answer in (as_v1.pay(newest), as_v1.pay(v2.payer.payment(200_000), tail="/pay"), as_v1.close(newest)):
        assert refusal(answer) == (404, "unknown_channel")
    as_v2 = V2(system.url, open_v1.payer, v2.http, v2.dialect)
    for secret in ("", "00" * 32, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"):
        for tail in ("", "/close"):
            body = as_v2.body(open_v1.payer.payment(200_000))
            answer = as_v2.http.put(as_v2.resource(tail, secret), content=body)
            assert (answer.status_code, answer.content) == (404, b"")
    assert system.channel(v2.payer.outpoint)["value_received"] == 100_000
    assert system.channel(open_v1.payer.outpoint)["value_received"] == 100_000


@BOTH_PATHS
def test_errors_have_code_and_numbers_in_every_published_form(open_v2: V2) -> None:
    """One object has `error_msg` (library), `type` and `message` (drafts), `error`, the code, and both numbers."""
    body = open_v2.pay(open_v2.payer.payment_of_change(5)).json()
    text = "change is dust: got 5 sat, need 0 or at least 700 sat"
    assert body == {
        "code": "dust_change",
        "error": text,
        "error_msg": text,
        "message": text,
        "type": "payment_error",
        "got_sat": 5,
        "need_sat": 700,
    }
    assert json.dumps(body).isascii()
