"""RBPCP §6.1 and §13.3: funding information of v2, as JSON and as a BIP70 payment request."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from paychan.protocol.types import Network
from tests.lib.rbpcp import V1, Payer, refusal
from tests.lib.system import DEBUG_SERVER_KEY, System

BIP70 = "application/bitcoin-paymentrequest"


def _info(system: System, first: object, second: object, accept: str = "*/*") -> httpx.Response:
    url = f"{system.url}/v2/funding/{first}/{second}/info"
    return httpx.get(url, headers={"Accept": accept}, trust_env=False, verify=False)


def test_expiry_and_key_may_come_in_either_order(system: System) -> None:
    """The document has the expiry first, the library the key: both get the same terms, without `Location`."""
    payer = Payer()
    answers = [_info(system, payer.expiry, payer.public_key.hex()), _info(system, payer.public_key.hex(), payer.expiry)]
    for answer in answers:
        assert (answer.status_code, "Location" in answer.headers) == (200, False)
        assert answer.json() == {
            "server_pubkey": DEBUG_SERVER_KEY,
            "dust_limit": 700,
            "funding_address_copy": payer.terms.funding_address(Network.TEST),
            "open_price": 100_000,
            "funding_tx_min_conf": 6,
            "settlement_period_hours": 6,
            "min_duration_hours": 12,
            "redeem_script_copy": payer.terms.redeem_script.hex(),
        }


def test_debug_mode_does_not_check_the_date(system: System) -> None:
    """The benchmark of the drafts sends the expiry 1500000000 to v2."""
    assert _info(system, Payer().public_key.hex(), 1_500_000_000).status_code == 200


@pytest.mark.parametrize("expiry", ["499999999", "4294967296", "6194967295", "0", "soon", "0x1dcd6500", "1e9"])
def test_an_expiry_that_is_not_a_time_is_refused(system: System, expiry: str) -> None:
    """Block heights, numbers above 32 bits and other texts are 400 in both orders."""
    key = Payer().public_key.hex()
    for answer in (_info(system, expiry, key), _info(system, key, expiry)):
        status, code = refusal(answer)
        assert (status, code in ("malformed", "expiry_not_a_time")) == (400, True)


@pytest.mark.parametrize("key", ["02" + "ff" * 32, "04" + "11" * 32, "02" + "AB" * 32, "02" + "11" * 31, "x", "1" * 66])
def test_an_invalid_key_is_refused(system: System, key: str) -> None:
    """Anything but a compressed point in lower-case hex is 400 in both orders."""
    for answer in (_info(system, 1_500_000_000, key), _info(system, key, 1_500_000_000)):
        assert refusal(answer) == (400, "malformed")


def test_a_wallet_gets_a_payment_request(system: System) -> None:
    """Accept with the BIP70 type gets the protobuf of RBPCP §13.3: amount 0 to the funding script, and the terms."""
    payer = Payer()
    answer = _info(system, payer.expiry, payer.public_key.hex(), f"{BIP70}, */*;q=0.1")
    assert answer.headers["Content-Type"] == BIP70
    assert answer.headers["Content-Transfer-Encoding"] == "binary"
    [(number, details)] = _fields(answer.content)
    assert number == 4
    fields = dict(_fields(details))
    assert fields[1] == b"test"
    assert dict(_fields(fields[2])) == {1: 0, 2: payer.terms.funding_script}
    assert abs(fields[3] - time.time()) < 60
    assert fields[4] > fields[3]
    assert fields[5]
    assert 6 not in fields
    assert fields[7] == _info(system, payer.expiry, payer.public_key.hex()).content.rstrip(b"\n")


def _fields(raw: bytes) -> list[tuple[int, bytes | int]]:
    """Read the wire format of protocol buffers: numbers (type 0) and byte strings (type 2)."""
    found: list[tuple[int, bytes | int]] = []
    while raw:
        tag, raw = _varint(raw)
        value, raw = _varint(raw)
        if tag & 7 == 2:
            found.append((tag >> 3, raw[:value]))
            raw = raw[value:]
        else:
            assert tag & 7 == 0
            found.append((tag >> 3, value))
    return found


def _varint(raw: bytes) -> tuple[int, bytes]:
    size = next(index for index, byte in enumerate(raw) if byte < 0x80) + 1
    return sum((byte & 0x7F) << (7 * index) for index, byte in enumerate(raw[:size])), raw[size:]


def test_fault_25_no_address_is_given_out_while_the_disk_is_nearly_full(tmp_path: Path, http: httpx.Client) -> None:
    """If the disk is nearly full, terms of both versions and openings are 503 with Retry-After."""
    payer = Payer()
    with System(tmp_path, sections={"store": "reserve_mb = 1048576"}) as system:
        v1 = f"{system.url}/v1/fundingInfo?client_pubkey={payer.public_key.hex()}&exp_time={payer.expiry}"
        answers = [
            _info(system, payer.expiry, payer.public_key.hex()),
            httpx.get(v1, trust_env=False, verify=False),
            V1(system.url, payer, http).open(payer.payment(100_000)),
        ]
    assert [refusal(answer) for answer in answers] == [(503, "storage_full")] * 3
    assert all("Retry-After" in answer.headers for answer in answers)
