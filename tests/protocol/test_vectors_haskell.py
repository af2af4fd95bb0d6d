"""Vectors of the original Haskell client: its payments are read and verify (RBPCP §18)."""

from __future__ import annotations

import pytest

from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.expiry import check_expiry
from paychan.protocol.payment import PaymentVerifier, decode_v1, encode_v1
from tests.lib.vectors import HASKELL_CASES, HASKELL_DEBUG_FUNDING, Case

each_case = pytest.mark.parametrize("case", HASKELL_CASES, ids=lambda case: case.name)


def test_debug_funding() -> None:
    """The Haskell example of the debug rule gives the same outpoint and value."""
    want = HASKELL_DEBUG_FUNDING

    outpoint = debug_outpoint(bytes.fromhex(want["client_pubkey_hex"]), check_expiry(want["exp_time"]))

    assert str(outpoint) == f"{want['txid']}:{want['vout']}"
    assert want["value"] == DEBUG_FUNDING_SAT


@each_case
def test_redeem_script_and_address(case: Case) -> None:
    """The project builds the same script and funding address as the Haskell client."""
    assert case.terms.redeem_script.hex() == case.raw["redeem_script_hex"]
    assert case.terms.funding_address(case.network) == case.raw["funding_address"]


@each_case
def test_padded_payloads_are_read(case: Case) -> None:
    """The padded text of the Haskell client is read as its payment; the project writes it without padding."""
    for row in case.payments:
        payment = decode_v1(row["payload_base64url"])

        assert payment.change_sat == row["change_value"]
        assert f"{payment.flag:02x}" == row["sighash_flag"]
        assert (payment.change_sat.to_bytes(8, "little") + payment.signature_with_flag).hex() == row["payload_hex"]
        assert encode_v1(payment) == row["payload_base64url"].rstrip("=")


@each_case
def test_payments_verify(case: Case) -> None:
    """Every payment that the Haskell client signed verifies over the same digest."""
    hasher = case.terms.kind.payment_preimage(case.terms, case.outpoint, DEBUG_FUNDING_SAT, case.change_script)
    verifier = PaymentVerifier(case.terms, case.outpoint, DEBUG_FUNDING_SAT, case.change_script)
    for row in case.payments:
        payment = decode_v1(row["payload_base64url"])

        assert hasher.digest(payment.change_sat).hex() == row["sighash_hex"]
        assert verifier.problem(payment) is None


def test_some_payloads_are_padded() -> None:
    """The vectors contain padded payloads, so the tests above read some."""
    texts = [row["payload_base64url"] for case in HASKELL_CASES for row in case.payments]

    assert any(text.endswith("=") for text in texts)
