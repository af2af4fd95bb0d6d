"""Strict DER with low S: the project's check against frozen signatures, Core and libsecp256k1 (threat 17)."""

from __future__ import annotations

import pytest

from paychan.protocol.channel import Pay, Rejected
from paychan.protocol.errors import SignatureEncoding
from paychan.protocol.payment import Payment, encoding_problem
from paychan.protocol.state_machine import apply
from tests.lib.channels import VIEW, Payer, private_key
from tests.lib.ecdsa import ORDER, digest_for, high_s_twin
from tests.lib.kernel import interpreter_reads
from tests.lib.looped import looped
from tests.lib.vectors import read_vectors

SIGNATURES = read_vectors("der_signatures.json")
HIGH_S = "S is in the upper half"
STRICTER_THAN_CORE = {HIGH_S, "R is longer than 256 bits"}
"""Core accepts these encodings: it does not relay the first, and the second never verifies."""

each_valid = pytest.mark.parametrize("row", SIGNATURES["valid"], ids=lambda row: row["comment"])
each_invalid = looped("row", SIGNATURES["invalid"], ids=lambda row: row["comment"])


@each_valid
def test_threat_17_strict_signatures_are_taken(row: dict[str, str]) -> None:
    """Strict DER with low S is accepted, and Core accepts it too."""
    signature = bytes.fromhex(row["hex"])

    assert encoding_problem(signature) is None
    assert interpreter_reads(signature + b"\x83")


@each_invalid
def test_threat_17_other_encodings_are_refused(row: dict[str, str]) -> None:
    """Every other encoding is refused with its reason; Core refuses it too, except for two kinds of large numbers."""
    signature = bytes.fromhex(row["hex"])

    assert encoding_problem(signature) == row["reason"]
    assert interpreter_reads(signature + b"\x83") == (row["reason"] in STRICTER_THAN_CORE)


@each_invalid
def test_threat_17_a_payment_with_such_a_signature_is_refused(row: dict[str, str]) -> None:
    """The state machine refuses the encoding before it verifies, so it never gets into a settlement."""
    payer = Payer("encodings")
    channel = payer.channel()
    good = payer.payment(channel.payment.change_sat - 1)

    outcome = apply(channel, Pay(Payment(good.change_sat, bytes.fromhex(row["hex"]), good.flag)), VIEW)

    assert outcome == Rejected(SignatureEncoding(reason=row["reason"]))


def test_threat_17_high_s_of_a_good_payment_is_refused() -> None:
    """Any peer can turn a signature into its high-S form, which nodes don't relay: it is valid, but refused."""
    payer = Payer("twin")
    channel = payer.channel()
    good = payer.payment(channel.payment.change_sat - 1)

    outcome = apply(channel, Pay(Payment(good.change_sat, high_s_twin(good.signature), good.flag)), VIEW)

    assert outcome == Rejected(SignatureEncoding(reason=HIGH_S))


@looped("s", [1, ORDER // 2 - 1, ORDER // 2, ORDER // 2 + 1, ORDER - 1])
def test_threat_17_the_boundary_of_s_is_that_of_libsecp256k1(s: int) -> None:
    """A valid signature is accepted up to exactly half the group's order, as libsecp256k1 does."""
    key = private_key("boundary")
    digest, signature = digest_for(key, 12345, s)

    taken = encoding_problem(signature) is None

    assert taken == (s <= ORDER // 2)
    assert taken == key.public_key.verify(signature, digest, hasher=None)


@looped("position", range(72))
def test_threat_17_one_byte_changed_anywhere_is_judged_as_core_does(position: int) -> None:
    """For all values of one byte the check refuses what Core refuses, and numbers that are too large."""
    longest = bytes.fromhex(SIGNATURES["valid"][1]["hex"]) + b"\x83"
    for value in range(256):
        changed = longest[:position] + bytes([value]) + longest[position + 1 :]
        problem = encoding_problem(changed[:-1])

        assert interpreter_reads(changed) == (problem in {None, *STRICTER_THAN_CORE}), changed.hex()


def test_libsecp256k1_never_raises_for_what_passes() -> None:
    """Invalid DER makes coincurve raise; a signature that passes the check is at worst a wrong one."""
    key = private_key("any").public_key
    for row in SIGNATURES["valid"]:
        assert not key.verify(bytes.fromhex(row["hex"]), bytes(32), hasher=None)
