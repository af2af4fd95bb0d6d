"""The v1 `payment` parameter: all accepted spellings, and all kinds of hostile texts that are refused (RBPCP §4.1)."""

from __future__ import annotations

import base64

import pytest

from paychan.protocol.errors import Malformed
from paychan.protocol.payment import Payment, decode_v1, encode_v1
from paychan.protocol.types import MAX_MONEY_SAT, Sat
from tests.lib.looped import looped

DER = bytes.fromhex("3006020111020122")
"""The shortest strict DER signature: two integers of one byte."""

LONG_DER = bytes.fromhex("3046022100" + "ff" * 32 + "022100" + "ee" * 32)
"""The longest one, with a high S: the reader of a payload does not check S."""


def text_of(raw: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def payload(change: int, signature: bytes = DER, flag: int = 0x83, tail: bytes = b"") -> str:
    """A payload from its parts."""
    return text_of(change.to_bytes(8, "little") + signature + bytes([flag]) + tail)


PAYMENT = Payment(Sat(1019), bytes.fromhex("30080203" + "7bfbff" + "020122"), 0x83)
TEXT = encode_v1(PAYMENT)


@looped(
    "text",
    [
        TEXT,
        TEXT + "=" * (-len(TEXT) % 4),
        TEXT.replace("-", "+").replace("_", "/"),
        TEXT.replace("-", " "),
    ],
    ids=["unpadded", "padded", "standard alphabet", "plus arrived as space"],
)
def test_every_known_spelling_is_the_same_payment(text: str) -> None:
    """Padded or not, `-_` or `+/`, and a `+` that a form decoder turned into a space, are one payment."""
    assert decode_v1(text) == PAYMENT


def test_the_spellings_differ() -> None:
    """The sample contains a character that each spelling writes differently."""
    assert "-" in TEXT
    assert len(TEXT) % 4


FOREIGN = [*"!\"#$%&'()*,.:;<>?@[\\]^`{|}~\n\r\t\0", "é", "\u0661", "\uff21", "\ud800"]


@looped("character", FOREIGN, ids=ascii)
@looped("position", [0, 5, -1])
def test_threat_27_characters_outside_the_alphabet_are_refused(character: str, position: int) -> None:
    """The reader skips or guesses no character outside the two alphabets (threat 27)."""
    text = list(TEXT)
    text[position] = character

    with pytest.raises(Malformed):
        decode_v1("".join(text))


@looped(
    "text",
    [
        "=" + TEXT,
        TEXT[:8] + "=" + TEXT[8:],
        TEXT[:8] + "==" + TEXT[8:],
        TEXT + "===",
        TEXT + "====",
        TEXT + "=\n",
        TEXT + "=A",
    ],
)
def test_padding_elsewhere_or_too_much_is_refused(text: str) -> None:
    """Padding is at most two `=` at the very end."""
    with pytest.raises(Malformed):
        decode_v1(text)


@looped("size", range(17))
def test_short_payloads_are_refused(size: int) -> None:
    """A payload below the least length is refused at every length, and the reader does not read past its end."""
    whole = (1000).to_bytes(8, "little") + DER + b"\x83"

    with pytest.raises(Malformed):
        decode_v1(text_of(whole[:size]))


@looped("signature", [DER, LONG_DER], ids=["shortest", "longest"])
def test_the_shortest_and_the_longest_payload_are_read(signature: bytes) -> None:
    """Both ends of the range of signature lengths are read."""
    assert decode_v1(payload(1000, signature)) == Payment(Sat(1000), signature, 0x83)


@looped("tail", [b"\x00", b"\x83", bytes(3), bytes(100), bytes(5000)])
def test_trailing_bytes_are_refused(tail: bytes) -> None:
    """Bytes after the flag are refused; the Haskell reader ignored them."""
    with pytest.raises(Malformed):
        decode_v1(payload(1000, tail=tail))


@looped("length", [number for number in range(256) if number != DER[1]])
def test_every_other_length_byte_is_refused(length: int) -> None:
    """The DER length byte must leave exactly one byte for the flag; the 255 other values are refused."""
    with pytest.raises(Malformed):
        decode_v1(payload(1000, bytes([0x30, length]) + DER[2:]))


@looped("first", [number for number in range(256) if number != 0x30])
def test_every_other_first_byte_is_refused(first: int) -> None:
    """A signature begins with the tag of a DER sequence."""
    with pytest.raises(Malformed):
        decode_v1(payload(1000, bytes([first]) + DER[1:]))


def test_a_signature_longer_than_any_is_refused() -> None:
    """73 bytes are refused even if the length byte agrees."""
    with pytest.raises(Malformed):
        decode_v1(payload(1000, bytes([0x30, 71]) + bytes(71)))


@looped("change", [0, 1, 2**32 - 1, 2**32, MAX_MONEY_SAT - 1, MAX_MONEY_SAT])
def test_threat_40_change_up_to_all_bitcoins_is_read(change: int) -> None:
    """Every possible amount is read (threat 40)."""
    assert decode_v1(payload(change)).change_sat == change


@looped("change", [MAX_MONEY_SAT + 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1])
def test_threat_40_change_above_all_bitcoins_is_refused(change: int) -> None:
    """More than 21 million bitcoins are refused, with both numbers (threat 40)."""
    with pytest.raises(Malformed, match=f"got {change} sat.*{MAX_MONEY_SAT} sat"):
        decode_v1(payload(change))


@looped("flag", range(256))
def test_every_flag_byte_is_read_as_it_is(flag: int) -> None:
    """The reader keeps the flag byte; one later check has the rule about it."""
    assert decode_v1(payload(1000, flag=flag)).flag == flag


def test_empty_text_is_refused() -> None:
    """An empty parameter is malformed, not a crash."""
    with pytest.raises(Malformed, match="got 0 bytes"):
        decode_v1("")
