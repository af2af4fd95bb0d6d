"""RBPCP §5.1 to §5.4: the refusals of v1; none changes a channel."""

from __future__ import annotations

import hashlib
import time
from hashlib import sha256
from typing import Any

import httpx
import msgspec
import pytest

from paychan.protocol.payment import Payment, encode_v1
from paychan.protocol.types import OutPoint
from tests.api.both_paths import BOTH_PATHS
from tests.lib.ecdsa import high_s_twin
from tests.lib.looped import looped
from tests.lib.rbpcp import V1, Payer, refusal
from tests.lib.system import DEBUG_SERVER_KEY, System

UNCOMPRESSED = "04" + "11" * 64
NOT_ON_CURVE = "02" + "ff" * 32
LIVE_ADDRESS = "1M8iwBs5XD7ZJQJCDC7BdLEpSivRQZJ2Hg"

BAD_KEYS: list[tuple[Any, str]] = [
    (None, "missing"),
    ("", "malformed"),
    ("zz" * 33, "malformed"),
    (UNCOMPRESSED, "malformed"),
    (NOT_ON_CURVE, "malformed"),
    ("07" + "11" * 32, "malformed"),
    (DEBUG_SERVER_KEY.upper(), "malformed"),
    (DEBUG_SERVER_KEY + "00", "malformed"),
    (" " + DEBUG_SERVER_KEY, "malformed"),
]

BAD_TIMES: list[tuple[Any, str]] = [
    (None, "missing"),
    ("", "malformed"),
    ("soon", "malformed"),
    ("+1900000000", "malformed"),
    ("-1900000000", "malformed"),
    ("1_900_000_000", "malformed"),
    ("1900000000.0", "malformed"),
    ("0x713fb300", "malformed"),
    ("١٩٠٠٠٠٠٠٠٠", "malformed"),
    (" 1900000000", "malformed"),
    ("9" * 5000, "malformed"),
    (499_999_999, "expiry_not_a_time"),
    (700_000, "expiry_not_a_time"),
    (2**32, "expiry_not_a_time"),
    (2**32 + 1_900_000_000, "expiry_not_a_time"),
]


@looped(("key", "code"), BAD_KEYS)
def test_funding_info_refuses_keys_that_are_not_compressed_points(v1: V1, key: Any, code: str) -> None:
    """Only a 33-byte compressed point in lower-case hex is a client key."""
    assert refusal(v1.funding_info(client_pubkey=key)) == (400, code)


def test_the_servers_own_key_is_no_client_key(v1: V1) -> None:
    """A client key that equals the server's is a 400."""
    assert v1.funding_info(client_pubkey=DEBUG_SERVER_KEY).status_code == 400


@looped(("expiry", "code"), BAD_TIMES)
def test_funding_info_refuses_an_expiry_that_is_not_a_time(v1: V1, expiry: Any, code: str) -> None:
    """Defect D14: block heights, values above 2^32, and anything but ASCII digits are refused."""
    assert refusal(v1.funding_info(exp_time=expiry)) == (400, code)


@looped("expiry", [500_000_000, 1_500_000_000, 2_147_483_648, 4_294_967_295])
def test_funding_info_does_not_check_the_date(v1: V1, expiry: int) -> None:
    """Past dates and the largest lock time get 200: scripts send 1500000000 to get the server key."""
    info = v1.funding_info(exp_time=expiry)
    assert (info.status_code, info.json()["server_pubkey"]) == (200, DEBUG_SERVER_KEY)


@looped(
    ("parameters", "code"),
    [
        *(({"client_pubkey": key}, code) for key, code in BAD_KEYS),
        *(({"exp_time": expiry}, code) for expiry, code in BAD_TIMES),
        ({"change_address": None}, "missing"),
        ({"change_address": ""}, "malformed"),
        ({"change_address": "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcZ"}, "malformed"),
        ({"change_address": LIVE_ADDRESS}, "malformed"),
        ({"change_address": "1" * 3000}, "malformed"),
        ({"change_address": "tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsq"}, "malformed"),
        ({"change_address": "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"}, "malformed"),
        ({"payment": None}, "missing"),
        ({"payment": ""}, "malformed"),
        ({"exp_time": 1_500_000_000}, "expiry_too_soon"),
    ],
)
def test_opening_refuses_bad_parameters(v1: V1, system: System, parameters: dict[str, Any], code: str) -> None:
    """A parameter that is missing or can't be read is a 400, and opens no channel."""
    payer = Payer(parameters["exp_time"]) if code == "expiry_too_soon" else v1.payer
    asking = V1(v1.url, payer, v1.http)
    assert refusal(asking.open(payer.payment(100_000), **parameters)) == (400, code)
    assert "funding_value" not in system.channel(payer.outpoint)


def test_opening_needs_time_for_payments_and_for_settling(v1: V1) -> None:
    """RBPCP §7.2, the rule of v2: the expiry must be later than now + settlement period + minimum duration."""
    hours = 6 + 12
    for late, answer in ((-60, (400, "expiry_too_soon")), (60, None)):
        payer = Payer(int(time.time()) + hours * 3600 + late)
        opened = V1(v1.url, payer, v1.http).open(payer.payment(100_000))
        assert (opened.status_code if answer is None else refusal(opened)) == (answer or 201)


def _changed(payment: Payment, **changes: Any) -> Payment:
    return msgspec.structs.replace(payment, **changes)


def _padded_r(signature: bytes) -> bytes:
    """Return the same signature with a superfluous zero byte before R."""
    return bytes([0x30, signature[1] + 1, 2, signature[3] + 1, 0]) + signature[4:]


def _bad_payments(payer: Payer) -> dict[str, tuple[Payment, str]]:
    """Payments that opening and paying refuse, with the error codes."""
    good, all_of_it = payer.payment(120_000), payer.payment_of_change(0)
    other = Payer().payment(120_000)
    return {
        "another key": (_changed(good, signature=other.signature), "bad_signature"),
        "another value": (_changed(good, change_sat=good.change_sat - 1), "bad_signature"),
        "another change address": (payer.payment(120_000, bytes.fromhex("a914" + "11" * 20 + "87")), "bad_signature"),
        "dust": (payer.payment_of_change(699), "dust_change"),
        "no change under 0x83": (_changed(all_of_it, flag=0x83), "flag_mismatch"),
        "change under 0x82": (_changed(good, flag=0x82), "flag_mismatch"),
        "flag 0x01": (_changed(good, flag=0x01), "bad_flag"),
        "high S": (_changed(good, signature=high_s_twin(good.signature)), "signature_encoding"),
        "more than there is": (payer.payment(-1), "value_backwards"),
        "padded R": (_changed(good, signature=_padded_r(good.signature)), "signature_encoding"),
    }


KINDS = list(_bad_payments(Payer()))


@looped("kind", KINDS)
def test_opening_refuses_bad_payments(v1: V1, system: System, kind: str) -> None:
    """A payment with a wrong signature, flag, encoding or change opens nothing."""
    payment, code = _bad_payments(v1.payer)[kind]
    assert refusal(v1.open(payment)) == (400, code)
    assert "funding_value" not in system.channel(v1.payer.outpoint)


@looped("kind", KINDS)
@pytest.mark.parametrize("tail", ["", "/pay"])
@BOTH_PATHS
def test_paying_refuses_bad_payments(open_v1: V1, system: System, kind: str, tail: str) -> None:
    """The same payments are a 400 on an open channel, which is unchanged."""
    before = system.channel(open_v1.payer.outpoint)
    payment, code = _bad_payments(open_v1.payer)[kind]
    assert refusal(open_v1.pay(payment, tail=tail)) == (400, code)
    assert system.channel(open_v1.payer.outpoint) == before


def test_dust_is_judged_to_the_satoshi(open_v1: V1) -> None:
    """The configured 700 satoshi of change are accepted; 699 are not."""
    assert refusal(open_v1.pay(open_v1.payer.payment_of_change(699))) == (400, "dust_change")
    assert open_v1.pay(open_v1.payer.payment_of_change(700)).status_code == 200


def test_an_opening_payment_below_the_price_is_short(v1: V1) -> None:
    """The opening payment must be at least the open price; the error has both numbers."""
    short = v1.open(v1.payer.payment(83_239))
    assert refusal(short) == (400, "payment_short")
    assert (short.json()["got_sat"], short.json()["need_sat"]) == (83_239, 83_240)
    assert "got 83239 sat, need 83240 sat" in short.reason_phrase


def test_value_does_not_decrease(open_v1: V1, system: System) -> None:
    """A payment that leaves the client more than the newest one is a 400 and changes nothing."""
    back = open_v1.pay(open_v1.payer.payment(99_999))
    assert refusal(back) == (400, "value_backwards")
    assert back.json()["got_sat"] == back.json()["need_sat"] + 1
    assert system.channel(open_v1.payer.outpoint)["value_received"] == 100_000


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("", "missing"),
        ("Payment=AAAA", "missing"),
        ("payment=", "malformed"),
        ("payment", "malformed"),
        ("payment=%ff%fe", "malformed"),
        ("payment=AAAA", "malformed"),
        ("payment=@@@@", "malformed"),
        ("payment=" + "A" * 107, "malformed"),
        ("payment=" + "A" * 4000, "malformed"),
        ("payment=AAAA&payment=AAAA", "repeated"),
    ],
)
@BOTH_PATHS
def test_an_unreadable_payment_is_refused(open_v1: V1, system: System, method: str, query: str, code: str) -> None:
    """A missing, repeated or undecodable payment is a 400 for paying and for closing, and changes nothing."""
    assert refusal(open_v1.http.request(method, f"{open_v1.resource}?{query}")) == (400, code)
    assert system.channel(open_v1.payer.outpoint)["value_received"] == 100_000


@pytest.mark.parametrize("junk", ["A", "AA", "AAAA", "%00", "%0A", "==A", "===", "%20%20", "&payment=x"])
@BOTH_PATHS
def test_junk_behind_a_payment_is_refused(open_v1: V1, junk: str) -> None:
    """Bytes or text after a payment are refused; further parameters are ignored."""
    url = f"{open_v1.resource}?payment={encode_v1(open_v1.payer.payment(120_000))}"
    assert open_v1.http.put(url + junk).status_code == 400
    assert open_v1.http.put(url + "&junk&=&%ff=1").status_code == 200


@BOTH_PATHS
def test_fault_75_only_the_payer_reads_the_value_of_a_channel(open_v1: V1) -> None:
    """An outpoint is public: a forged payment of any value is refused as a bad signature, by PUT and by DELETE."""
    forged = _changed(open_v1.payer.payment(99_999), signature=Payer().payment(5).signature)
    with httpx.Client(trust_env=False, verify=False) as stranger:
        for send in (V1(open_v1.url, open_v1.payer, stranger).pay, V1(open_v1.url, open_v1.payer, stranger).close):
            answer = send(forged)
            assert refusal(answer) == (400, "bad_signature")
            assert str(open_v1.payer.payment(100_000).change_sat) not in answer.text + answer.reason_phrase
    older = open_v1.payer.payment(50_000)
    assert refusal(open_v1.pay(older)) == (400, "value_backwards")
    assert open_v1.close(older).json()["need_sat"] == open_v1.payer.payment(100_000).change_sat


def test_fault_75_forged_closings_are_counted(v1: V1) -> None:
    """A DELETE with a bad signature delays its connection like a PUT."""
    with httpx.Client(trust_env=False, limits=httpx.Limits(max_connections=1), verify=False) as attacker:
        bad = V1(v1.url, v1.payer, attacker)
        assert bad.open(v1.payer.payment(100_000)).status_code == 201
        began = time.monotonic()
        for _ in range(4):
            assert refusal(bad.close(Payer().payment(100_001))) == (400, "bad_signature")
        assert time.monotonic() - began >= 0.15  # delays of 10, 20, 40 and 80 ms


def test_threat_29_only_the_newest_payment_closes(open_v1: V1, system: System) -> None:
    """DELETE compares value, signature and flag with the newest payment; anything else is a 400."""
    newest = open_v1.payer.payment(150_000)
    assert open_v1.pay(newest).status_code == 200
    older, newer = open_v1.payer.payment(100_000), open_v1.payer.payment(160_000)
    for wrong in (older, newer):
        assert refusal(open_v1.close(wrong)) == (400, "not_newest_payment")
    assert refusal(open_v1.close(_changed(newest, flag=0x82))) == (400, "flag_mismatch")
    assert refusal(open_v1.close(_changed(newest, signature=older.signature))) == (400, "bad_signature")
    assert system.channel(open_v1.payer.outpoint)["status"] == "open"
    assert open_v1.close(newest).status_code == 202
    assert refusal(open_v1.close(older)) == (400, "not_newest_payment")


@BOTH_PATHS
def test_fault_75_the_newest_payment_is_proven_to_its_client_alone(open_v1: V1) -> None:
    """Only a payment that the client signed gets the hash of the newest signature, and no answer holds that signature."""
    newest, older = open_v1.payer.payment(150_000), open_v1.payer.payment(100_000)
    assert open_v1.pay(newest).status_code == 200
    proof = hashlib.sha256(newest.signature).hexdigest()

    for honest in (open_v1.pay(older), open_v1.close(older)):
        assert honest.json()["newest_sha256"] == proof
        assert newest.signature.hex() not in honest.text
    for forged in (Payer().payment(100_000), _changed(older, signature=newest.signature), _changed(older, flag=0x82)):
        for answer in (open_v1.pay(forged), open_v1.close(forged)):
            assert answer.status_code == 400
            assert not {"newest_sha256", "need_sat"} & set(answer.json())


@BOTH_PATHS
def test_an_unknown_channel_is_not_found(v1: V1) -> None:
    """PUT, `/pay` and DELETE on an outpoint without a channel are 404."""
    payment = v1.payer.payment(100_000)
    for answer in (v1.pay(payment), v1.pay(payment, tail="/pay"), v1.close(payment)):
        assert refusal(answer) == (404, "unknown_channel")


@pytest.mark.parametrize(
    "name", ["{txid}/00", "{txid}/+0", "{txid}/-0", "{txid}/0x0", "{upper}/0", "{txid}/", "{txid}"]
)
@BOTH_PATHS
def test_threat_27_a_channel_has_one_name(open_v1: V1, name: str) -> None:
    """Other spellings of a txid or an index name no channel (threat 27)."""
    outpoint = OutPoint(sha256(open_v1.payer.public_key).digest(), 0)
    name = name.format(txid=outpoint.txid_hex, upper=outpoint.txid_hex.upper())
    assert refusal(open_v1.http.put(f"{open_v1.url}/v1/channels/{name}?payment=AAAA")) == (404, "no_such_route")


@BOTH_PATHS
def test_an_index_outside_32_bits_is_refused(v1: V1) -> None:
    """`vout` is a number of 32 bits."""
    payment = encode_v1(v1.payer.payment(100_000))
    url = f"{v1.url}/v1/channels/{v1.payer.outpoint.txid_hex}/{{}}?payment={payment}"
    assert refusal(v1.http.put(url.format(2**32))) == (400, "malformed")
    assert refusal(v1.http.put(url.format(2**32 - 1))) == (404, "unknown_channel")


def test_the_outpoint_of_an_open_channel_is_in_use(open_v1: V1) -> None:
    """A second opening is 409 with the `Location` of the channel, for every payment."""
    again = open_v1.open(open_v1.payer.payment(200_000))
    assert refusal(again) == (409, "channel_exists")
    assert again.headers["Location"] == open_v1.resource


def test_threat_4_the_outpoint_of_a_settled_channel_is_never_reused(open_v1: V1) -> None:
    """Opening at the outpoint of a settled channel is 409 without `Location` (threat 4)."""
    assert open_v1.close(open_v1.payer.payment(100_000)).status_code == 202
    again = open_v1.open(open_v1.payer.payment(200_000))
    assert refusal(again) == (409, "outpoint_used")
    assert "Location" not in again.headers


@BOTH_PATHS
def test_a_closed_channel_accepts_no_payment(open_v1: V1) -> None:
    """Paying on a settled channel is 410, also with the payment of the settlement."""
    newest = open_v1.payer.payment(100_000)
    assert open_v1.close(newest).status_code == 202
    for payment in (newest, open_v1.payer.payment(200_000)):
        assert refusal(open_v1.pay(payment)) == (410, "channel_closed")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/fundingInfo", "GET,HEAD,OPTIONS"),
        ("HEAD", "/v1/channels/new", "POST,OPTIONS"),
        ("GET", "/v1/channels/new", "POST,OPTIONS"),
        ("POST", "/v1/channels/" + "0" * 64 + "/0", "DELETE,PUT,OPTIONS"),
        ("PATCH", "/v1/channels/" + "0" * 64 + "/0", "DELETE,PUT,OPTIONS"),
        ("DELETE", "/v1/channels/" + "0" * 64 + "/0/pay", "PUT,OPTIONS"),
        ("BREW", "/v1/channels/new", "POST,OPTIONS"),
    ],
)
def test_other_methods_are_not_allowed(v1: V1, method: str, path: str, allowed: str) -> None:
    """A resource answers 405 to other methods, and lists its own in `Allow`."""
    answer = v1.http.request(method, v1.url + path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v3/channels", "/v1/channels/new/x", "/v1//fundingInfo", "/%2e"])
def test_other_paths_are_not_found(v1: V1, path: str) -> None:
    """An unknown path is 404, with an error body."""
    assert refusal(v1.http.get(v1.url + path)) == (404, "no_such_route")
