"""The id of a paid request: golden values, no two requests with the same id, names as clients write them."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.errors import Malformed
from paychan.protocol.request_id import (
    ID_BYTES,
    NO_BODY,
    content_id,
    derived_id,
    idempotency_key,
    named_id,
    payment_identifier,
)
from paychan.protocol.types import OutPoint, Sat
from tests.lib.looped import looped

CHANNEL, OTHER = OutPoint(bytes(range(32)), 1), OutPoint(bytes(range(32)), 2)


def test_golden_ids() -> None:
    """The ids of three requests never change: records hold them."""
    assert named_id(CHANNEL, "order-0001-20261201").hex() == "d0d00c7361cd25d1310fd13bc220de21"
    assert (
        derived_id(CHANNEL, Sat(99_975), "GET", "https://api.example/v1/tile").hex()
        == "de17cb3eaf766d02c797c11f933b69da"
    )
    assert content_id("GET", "https://api.example/v1/tile").hex() == "bd0cef79c69354d23bbce495e91a130c"


def test_the_layout_is_length_and_part() -> None:
    """An id is the head of SHA-256 over its parts, each after its length in four bytes, little endian."""
    parts = (b"derived", CHANNEL.serialize(), (7).to_bytes(8, "little"), b"PUT", b"/", sha256(b"body").digest())
    layout = b"".join(len(part).to_bytes(4, "little") + part for part in parts)

    got = derived_id(CHANNEL, Sat(7), "PUT", "/", sha256(b"body").digest())

    assert got == sha256(layout).digest()[:16]
    assert len(got) == ID_BYTES


def test_each_part_of_a_request_counts() -> None:
    """Requests that differ in channel, change value, method, URL or body have different ids."""
    requests = [
        (CHANNEL, Sat(7), "GET", "/a", NO_BODY),
        (OTHER, Sat(7), "GET", "/a", NO_BODY),
        (CHANNEL, Sat(8), "GET", "/a", NO_BODY),
        (CHANNEL, Sat(7), "HEAD", "/a", NO_BODY),
        (CHANNEL, Sat(7), "GET", "/a?", NO_BODY),
        (CHANNEL, Sat(7), "GET", "/a", sha256(b" ").digest()),
    ]

    assert len({derived_id(*request) for request in requests}) == len(requests)
    assert named_id(CHANNEL, "a" * 16) != named_id(OTHER, "a" * 16)


@given(st.tuples(st.text(max_size=4), st.text(max_size=4)), st.tuples(st.text(max_size=4), st.text(max_size=4)))
def test_no_text_moves_between_two_parts(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Two methods and URLs have the same id only if both are equal."""
    assert (content_id(*one) == content_id(*other)) == (one == other)


@looped(
    ("header", "key"),
    [
        ('"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (' "a b" ', "a b"),
        (r'"a \" b \\"', 'a " b \\'),
        ("a" * 255, "a" * 255),
    ],
)
def test_an_idempotency_key_is_read(header: str, key: str) -> None:
    """A quoted string and a bare text name the same request."""
    assert idempotency_key(header) == key


@looped(
    "header",
    ["", '""', '"a', 'a"', '"a"b"', "a b", "a,b", '"a"; q=1', "a" * 256, '"' + "a" * 256 + '"', "é", '"\x7f"', r'"\a"'],
)
def test_another_idempotency_key_is_refused(header: str) -> None:
    """A text that is no string and no bare key is refused, and so is one of more than 255 characters."""
    with pytest.raises(Malformed, match="Idempotency-Key"):
        idempotency_key(header)


@looped("text", ["a" * 15, "a" * 129, "a" * 15 + " ", "a" * 15 + "é", "a" * 16 + "\n", ""])
def test_another_payment_identifier_is_refused(text: str) -> None:
    """A payment-identifier has 16 to 128 letters, digits, `_` or `-`."""
    with pytest.raises(Malformed, match="payment-identifier"):
        payment_identifier(text)


@looped("text", ["a" * 16, "Az09_-" * 21 + "ab"])
def test_a_payment_identifier_is_taken(text: str) -> None:
    """The shortest and the longest are taken as they are."""
    assert payment_identifier(text) == text
