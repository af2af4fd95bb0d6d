"""Signed receipts: frozen vectors, and one change of each part, which is refused with the code of its kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from coincurve import PrivateKey
from msgspec.structs import replace

from paychan.protocol.certificate import Certificate, certificate_digest, tagged_hash
from paychan.protocol.receipts import (
    MAX_RECEIPT_BYTES,
    Fault,
    NotVerified,
    Paid,
    Verified,
    sign_receipt,
    verify_receipt,
)
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat, UnixTime
from paychan.protocol.wire.canonical import canonical_json
from tests.lib.looped import looped
from tests.lib.vectors import read_vectors

VECTORS = read_vectors("receipts.json")
IDENTITY, KEY, STRANGER = (PrivateKey(bytes([number]) * 32) for number in (0x55, 0x66, 0x77))
BEGIN, END = UnixTime(1_800_000_000), UnixTime(1_800_604_800)
PAID = Paid(
    channel=OutPoint.parse("ab" * 32, 1),
    change_sat=Sat(995_000),
    charged_sat=Sat(25),
    credit_sat=Sat(75),
    method="GET",
    url="https://tiles.example/v1/tile/5?z=3",
    time=UnixTime(1_800_000_100),
    request_sha256=bytes(32),
    answer_sha256=b"\xff" * 32,
)


def certified(
    key: PrivateKey = KEY, identity: PrivateKey = IDENTITY, begin: int = BEGIN, end: int = END
) -> Certificate:
    times = UnixTime(begin), UnixTime(end)
    receipt_key = key.public_key.format()
    signature = identity.sign(certificate_digest(receipt_key, *times), hasher=None)
    return Certificate(identity.public_key.format(), receipt_key, *times, signature)


CERTIFICATE = certified()
OURS = CERTIFICATE.identity


def fault(raw: bytes, identity: bytes | None = OURS) -> Fault:
    result = verify_receipt(raw, identity)
    assert isinstance(result, NotVerified), result
    assert result.reason
    return result.fault


def changed(path: str, value: Any, *, resigned: bool = False) -> bytes:
    """The receipt of `PAID` with one member replaced (None: left out), and with the signature that this needs."""
    members = json.loads(sign_receipt(PAID, CERTIFICATE, KEY))
    *parents, last = path.split(".")
    place = members
    for name in parents:
        place = place[name]
    place[last] = value
    if value is None:
        del place[last]
    if resigned:
        members.pop("signature")
        members["signature"] = KEY.sign(tagged_hash("paychan/receipt", canonical_json(members)), hasher=None).hex()
    return canonical_json(members)


@looped("case", VECTORS["valid"], ids=lambda case: case["comment"])
def test_valid_vectors_verify(case: dict[str, Any]) -> None:
    """A receipt of every release verifies for ever, and says what was paid."""
    result = verify_receipt(case["receipt"].encode(), bytes.fromhex(VECTORS["identity"]))

    assert isinstance(result, Verified), result
    assert (str(result.paid.channel), result.paid.charged_sat) == (case["channel"], case["charged_sat"])


@looped("case", VECTORS["invalid"], ids=lambda case: case["comment"])
def test_invalid_vectors_are_refused(case: dict[str, Any]) -> None:
    """Each has the code of its fault."""
    assert fault(case["receipt"].encode(), bytes.fromhex(VECTORS["identity"])).value == case["code"]


def test_there_is_an_invalid_vector_of_every_fault() -> None:
    """No fault is unproved; a receipt that is too large is made here."""
    codes = {case["code"] for case in VECTORS["invalid"]}

    assert codes == {each.value for each in Fault} - {Fault.TOO_LARGE.value}
    assert fault(b"[" * (MAX_RECEIPT_BYTES + 1)) is Fault.TOO_LARGE


@looped(
    "paid",
    [
        PAID,
        replace(PAID, request_sha256=None, answer_sha256=None),
        replace(PAID, change_sat=Sat(0), charged_sat=Sat(0), credit_sat=MAX_MONEY_SAT),
        replace(PAID, time=BEGIN),
        replace(PAID, time=END),
    ],
)
def test_a_receipt_says_what_was_signed(paid: Paid) -> None:
    """Amounts, channel, request and digests come back as they were; with and without the identity, and a line feed."""
    raw = sign_receipt(paid, CERTIFICATE, KEY)

    for given, identity in ((raw, OURS), (raw, None), (raw + b"\n", OURS)):
        assert verify_receipt(given, identity) == Verified(paid, CERTIFICATE)
    assert sign_receipt(paid, CERTIFICATE, KEY) == raw


CHANGES: dict[str, Any] = {
    "channel": "ab" * 32 + ":2",
    "change_sat": 995_001,
    "charged_sat": 24,
    "credit_sat": 76,
    "method": "POST",
    "url": "https://tiles.example/v1/tile/6?z=3",
    "time": "2027-01-15T08:01:41Z",
    "request_sha256": None,
    "answer_sha256": "00" * 32,
}


@looped("name", CHANGES)
def test_every_fact_is_signed(name: str) -> None:
    """A change of any fact, without the receipt key, is a bad signature."""
    assert fault(changed(name, CHANGES[name])) is Fault.BAD_SIGNATURE
    assert isinstance(verify_receipt(changed(name, CHANGES[name], resigned=True), OURS), Verified)


def test_every_part_of_a_certificate_counts() -> None:
    """Another key, other times and another signer make the certificate invalid, although the receipt is signed again."""
    parts = {
        "receipt_key": STRANGER.public_key.format().hex(),
        "not_before": "2027-01-15T07:59:59Z",
        "not_after": "2028-01-22T08:00:00Z",
        "signature": certified(identity=STRANGER).signature.hex(),
    }
    for name, value in parts.items():
        assert fault(changed(f"certificate.{name}", value, resigned=True)) is Fault.BAD_CERTIFICATE, name
    assert fault(changed("identity", STRANGER.public_key.format().hex(), resigned=True), None) is Fault.BAD_CERTIFICATE


def test_another_server_is_named() -> None:
    """A receipt of a stranger verifies as the stranger's, and never as that of the server that the caller means."""
    raw = sign_receipt(PAID, certified(identity=STRANGER), KEY)

    assert fault(raw) is Fault.OTHER_IDENTITY
    result = verify_receipt(raw)
    assert isinstance(result, Verified)
    assert result.certificate.identity == STRANGER.public_key.format()


@looped("time", [BEGIN - 1, END + 1])
def test_a_key_signs_in_its_time_alone(time: int) -> None:
    """A receipt of the second before or after the certificate's time is refused."""
    assert fault(sign_receipt(replace(PAID, time=UnixTime(time)), CERTIFICATE, KEY)) is Fault.OUTSIDE_CERTIFICATE


def test_the_certified_key_signs() -> None:
    """A signature by another key, or by the identity key itself, does not count."""
    for key in (STRANGER, IDENTITY):
        assert fault(sign_receipt(PAID, CERTIFICATE, key)) is Fault.BAD_SIGNATURE


@looped(
    ("path", "value"),
    [
        ("charged_sat", -1),
        ("charged_sat", MAX_MONEY_SAT + 1),
        ("charged_sat", 25.5),
        ("charged_sat", True),
        ("charged_sat", "25"),
        ("charged_sat", None),
        ("channel", "ab" * 32),
        ("channel", "AB" * 32 + ":1"),
        ("channel", "ab" * 32 + ":01"),
        ("channel", "ab" * 32 + ":4294967296"),
        ("time", "2027-01-15T08:01:40.5Z"),
        ("time", "2027-01-15T09:01:40+01:00"),
        ("time", "2027-02-30T08:01:40Z"),
        ("url", "https://tiles.example/\x1b[31m"),
        ("url", ""),
        ("method", "GET\n"),
        ("identity", "05" + "ab" * 32),
        ("signature", "30"),
        ("signature", "30" + "ab" * 40 + "\n"),
        ("request_sha256", "ab"),
        ("certificate", {}),
        ("more", 1),
        ("certificate.more", 1),
    ],
)
def test_other_members_and_values_are_no_receipt(path: str, value: Any) -> None:
    """Amounts outside the range, other spellings of a value, control characters, and unknown members are refused."""
    members = json.loads(sign_receipt(PAID, CERTIFICATE, KEY))
    *parents, last = path.split(".")
    place = members[parents[0]] if parents else members
    place[last] = value
    if value is None:
        del place[last]

    assert fault(json.dumps(members, separators=(",", ":"), sort_keys=True).encode()) is Fault.MALFORMED


@looped("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 30_000, b'{"version":1}'])
def test_other_bytes_are_no_receipt(raw: bytes) -> None:
    """Whatever the file holds, the result is a value."""
    assert fault(raw) is Fault.MALFORMED


def test_one_text_for_each_receipt() -> None:
    """A repeated member, spaces, another order and a second line feed are refused: what is read is what was signed."""
    raw = sign_receipt(PAID, CERTIFICATE, KEY)
    members = json.loads(raw)
    for other in (
        raw.replace(b'"charged_sat":25', b'"charged_sat":99,"charged_sat":25'),
        json.dumps(members).encode(),
        json.dumps(dict(reversed(members.items())), separators=(",", ":")).encode(),
        raw.replace(b"https", b"http\\u0073"),
        raw + b"\n\n",
    ):
        assert fault(other) is Fault.NOT_CANONICAL


def test_nothing_is_signed_that_could_not_be_read() -> None:
    """A URL with other characters, or of excessive length, has no receipt."""
    for url in ("https://tiles.example/ä", "https://tiles.example/" + "a" * MAX_RECEIPT_BYTES, "a b"):
        with pytest.raises(ValueError, match=r"receipt|bytes"):
            sign_receipt(replace(PAID, url=url), CERTIFICATE, KEY)
