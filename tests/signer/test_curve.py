"""Points and signatures in a token's encoding, converted to Bitcoin's."""

from __future__ import annotations

import contextlib

import pytest
from coincurve import PrivateKey, PublicKey
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.keys import GROUP_ORDER
from paychan.protocol.payment import encoding_problem
from signer.token.curve import compressed_point, der_signature
from tests.lib.ecdsa import der
from tests.lib.looped import looped

numbers = st.integers(1, GROUP_ORDER - 1)
small_numbers = st.one_of(numbers, st.integers(1, 1 << 16), st.integers(GROUP_ORDER - 5, GROUP_ORDER - 1))
keys = numbers.map(PrivateKey.from_int)


def raw(r: int, s: int) -> bytes:
    """The two numbers as CKM_ECDSA returns them."""
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


@given(small_numbers, small_numbers)
def test_any_signature_becomes_strict_der_with_low_s(r: int, s: int) -> None:
    """For any r and s of a token, the result passes the encoding rule of payments, and has the same numbers."""
    signature = der_signature(raw(r, s))

    assert encoding_problem(signature) is None
    assert signature == der(r, min(s, GROUP_ORDER - s))


@given(keys, st.binary(min_size=32, max_size=32), st.booleans())
def test_signatures_with_high_s_verify_too(key: PrivateKey, digest: bytes, high: bool) -> None:
    """A token's signature verifies after its conversion, with a low or a high S."""
    compact = key.sign_recoverable(digest, hasher=None)[:64]
    r, s = int.from_bytes(compact[:32], "big"), int.from_bytes(compact[32:], "big")

    signature = der_signature(raw(r, GROUP_ORDER - s if high else s))

    assert key.public_key.verify(signature, digest, hasher=None)


@looped(
    "wrong",
    [
        b"",
        bytes(64),
        raw(1, 0),
        raw(0, 1),
        raw(GROUP_ORDER, 1),
        raw(1, GROUP_ORDER),
        raw(1, 1)[:-1],
        raw(1, 1) + b"\x00",
    ],
    ids=["empty", "zeros", "s 0", "r 0", "r order", "s order", "63 bytes", "65 bytes"],
)
def test_wrong_bytes_are_no_signature(wrong: bytes) -> None:
    """Zero, the group's order, and anything but 64 bytes raise."""
    with pytest.raises(ValueError, match="no signature"):
        der_signature(wrong)


@given(keys)
def test_a_point_is_read_in_every_form(key: PrivateKey) -> None:
    """With and without the OCTET STRING, compressed or not, a point gives the same compressed key."""
    expected = key.public_key.format()

    for compressed in (True, False):
        point = key.public_key.format(compressed=compressed)
        assert compressed_point(point) == expected
        assert compressed_point(bytes([4, len(point)]) + point) == expected


@given(st.binary(max_size=70))
def test_anything_else_is_no_point(junk: bytes) -> None:
    """Bytes either are a point on the curve, or raise ValueError."""
    with contextlib.suppress(ValueError):
        PublicKey(compressed_point(junk))


@looped("first", [5, 6, 7, 0])
def test_hybrid_points_are_refused(first: int) -> None:
    """A point with another first byte is refused, even 06 and 07, which libsecp256k1 accepts."""
    point = PrivateKey(b"\x05" * 32).public_key.format(compressed=False)

    with pytest.raises(ValueError, match="no point"):
        compressed_point(bytes([first]) + point[1:])


def test_points_off_the_curve_are_refused() -> None:
    """A point of the right form that is not on secp256k1 raises."""
    point = bytearray(PrivateKey(b"\x05" * 32).public_key.format(compressed=False))
    point[-1] ^= 1

    with pytest.raises(ValueError):
        compressed_point(bytes(point))
