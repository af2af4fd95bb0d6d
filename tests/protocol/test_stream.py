"""The stream's frames: encoding and decoding, and the conversion of compact signatures to DER."""

from __future__ import annotations

import pytest
from coincurve import PrivateKey
from coincurve.ecdsa import cdata_to_der, deserialize_compact, signature_normalize
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.errors import Malformed
from paychan.protocol.payment import Payment, PaymentVerifier, encoding_problem
from paychan.protocol.types import Sat
from paychan.protocol.wire.payment_frames import (
    Said,
    Taken,
    der_signature,
    read_answers,
    read_payments,
    write_answers,
    write_payments,
)
from tests.lib.channels import Payer
from tests.lib.looped import looped

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
numbers = st.integers(0, 40).flatmap(lambda shift: st.integers(1, ORDER - 1).map(lambda n: max(1, n >> (6 * shift))))
amounts = st.integers(0, 2**64 - 1).map(Sat)


def compact(number: int) -> bytes:
    return number.to_bytes(32)


@given(numbers, numbers)
def test_a_compact_signature_becomes_the_der_of_coincurve(r: int, s: int) -> None:
    """The DER equals coincurve's for the same two numbers with low S, and passes the strict rules of payments."""
    _, normalized = signature_normalize(deserialize_compact(compact(r) + compact(s)))
    der = der_signature(compact(r), compact(s))
    assert der == cdata_to_der(normalized)
    assert encoding_problem(der) is None


@given(st.binary(min_size=32, max_size=32))
def test_a_signature_of_coincurve_comes_back_unchanged(digest: bytes) -> None:
    """A payment that is written into a frame and read back has the same signature bytes."""
    signature = PrivateKey(b"\x01" * 32).sign(digest, hasher=None)
    payment = Payment(Sat(1000), signature, 0x83)
    assert list(read_payments(write_payments([payment]))) == [payment]


@given(st.integers(0, 2**256 - 1), st.integers(0, 2**256 - 1))
def test_numbers_that_no_signature_has_do_not_verify(r: int, s: int) -> None:
    """Any 64 bytes become a payment that is judged, without an exception."""
    payer = Payer("stream")
    verifier = PaymentVerifier(payer.terms, payer.outpoint, payer.funding_sat, payer.change_script)
    for numbers in ((r, s), (0, s), (r, 0), (ORDER, s), (r, ORDER), (2**256 - 1, 2**256 - 1)):
        payment = Payment(Sat(1000), der_signature(*map(compact, numbers)), 0x83)
        assert verifier.problem(payment) is not None


def test_the_flag_follows_from_the_change_value() -> None:
    """Payments with change have 0x83, the one without has 0x82, and each is read back as it was signed."""
    payer = Payer("stream flags")
    payments = [payer.payment(change) for change in (5000, 1, 0)]
    assert list(read_payments(write_payments(payments))) == payments


def test_a_frame_has_the_documented_layout() -> None:
    """Version, then 8 bytes of change and 64 of signature for each payment."""
    payer = Payer("stream layout")
    first, second = payer.payment(5000), payer.payment(4000)
    frame = write_payments([first, second])
    assert len(frame) == 1 + 2 * 72
    assert frame[0] == 1
    assert frame[1:9] == (5000).to_bytes(8, "little")
    assert frame[73:81] == (4000).to_bytes(8, "little")
    assert write_answers([Taken(Sat(5000), Sat(7)), Said(400, b"{}")]) == (
        b"\x01" + b"\x00" + (5000).to_bytes(8, "little") + (7).to_bytes(8, "little") + b"\x01\x90\x01\x02\x00\x00\x00{}"
    )


@given(st.lists(st.builds(Taken, amounts, amounts) | st.builds(Said, st.integers(0, 999), st.binary(max_size=60))))
def test_answers_are_read_as_they_were_written(answers: list[Taken | Said]) -> None:
    """Any mixture of answers is read back as it was written."""
    assert read_answers(write_answers(answers)) == answers


@given(st.binary(max_size=200))
def test_a_frame_of_anything_is_read_or_refused(frame: bytes) -> None:
    """Random bytes are read as payments or answers, or raise only `Malformed`."""
    for read in (read_payments, read_answers):
        try:
            list(read(frame))
        except Malformed:
            continue


@looped("frame", [b"", b"\x01", b"\x02" + bytes(72), b"\x01" + bytes(71), b"\x01" + bytes(73)])
def test_a_frame_that_is_no_payments_is_malformed(frame: bytes) -> None:
    """Another version, an empty frame and an incomplete one are refused."""
    with pytest.raises(Malformed):
        read_payments(frame)
