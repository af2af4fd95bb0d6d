"""RBPCP §4.1: all known encodings of the `payment` parameter mean the same payment."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from paychan.protocol.payment import Payment, encode_v1
from tests.api.both_paths import BOTH_PATHS
from tests.lib.rbpcp import V1

pytestmark = BOTH_PATHS


def _raw(payment: Payment) -> bytes:
    return payment.change_sat.to_bytes(8, "little") + payment.signature_with_flag


def _payment_with_both_signs(v1: V1) -> Payment:
    """Make a payment whose text has both characters in which the two alphabets differ."""
    return next(
        payment
        for payment in map(v1.payer.payment, range(100_001, 200_000))
        if {"-", "_"} <= set(encode_v1(payment)) and len(_raw(payment)) % 3
    )


@pytest.mark.parametrize(
    ("encode", "escape"),
    [
        (base64.urlsafe_b64encode, False),
        (base64.b64encode, False),
        (base64.b64encode, True),
        (base64.urlsafe_b64encode, True),
    ],
    ids=["url alphabet", "plus as space", "percent-encoded plus", "percent-encoded url alphabet"],
)
@pytest.mark.parametrize("padded", [True, False])
def test_both_alphabets_with_and_without_padding_are_one_payment(
    open_v1: V1, encode: Callable[[bytes], bytes], escape: bool, padded: bool
) -> None:
    """JavaScript sends no padding, Haskell sends `=` unquoted; `+/` is accepted too, also with a space for `+`."""
    payment = _payment_with_both_signs(open_v1)
    text = encode(_raw(payment)).decode()
    assert text.endswith("=")
    text = text if padded else text.rstrip("=")
    if escape:
        text = "".join(f"%{ord(character):02X}" for character in text)
    paid = open_v1.http.put(f"{open_v1.resource}?payment={text}")
    assert (paid.status_code, paid.json()["channel_value_left"]) == (200, payment.change_sat)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw + b"\x00",
        lambda raw: raw[:-1],
        lambda raw: raw[:16],
        lambda raw: (2_100_000_000_000_001).to_bytes(8, "little") + raw[8:],
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:9] + b"\x80" + raw[10:],
        lambda raw: raw[:9] + bytes([raw[9] + 1]) + raw[10:],
        lambda raw: raw[:8] + b"\x31" + raw[9:],
    ],
    ids=[
        "a byte behind the flag",
        "no flag",
        "below 17 bytes",
        "above 21 million bitcoin",
        "all ones",
        "long DER length",
        "length of one more",
        "no sequence",
    ],
)
def test_malformed_payments_are_refused(open_v1: V1, spoil: Callable[[bytes], bytes]) -> None:
    """Trailing bytes, a DER length without room for the flag byte, and impossible amounts can't be decoded."""
    text = base64.urlsafe_b64encode(spoil(_raw(open_v1.payer.payment(120_000)))).decode()
    refused = open_v1.http.put(f"{open_v1.resource}?payment={text}")
    assert (refused.status_code, refused.json()["code"]) == (400, "malformed")
