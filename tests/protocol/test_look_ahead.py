"""A signature may be checked before its payment is judged; the result is the same."""

from __future__ import annotations

from paychan.protocol.errors import BadSignature
from paychan.protocol.payment import Payment, PaymentVerifier
from tests.lib.rbpcp import Payer


def test_an_early_check_counts_only_for_its_payment() -> None:
    """The verdict stays the same if another payment was checked in between, or if an equal one is judged."""
    payer = Payer()
    good, other = payer.payment(100_001), payer.payment(100_002)
    bad = Payment(good.change_sat, other.signature, good.flag)
    verifier = PaymentVerifier(payer.terms, payer.outpoint, payer.funding_sat, payer.change_script)
    for ahead in (good, other, bad):
        for asked in (good, other, bad, Payment(bad.change_sat, bad.signature, bad.flag)):
            verifier.look_ahead(ahead)
            assert (verifier.problem(asked) is None) is (asked in (good, other))
            assert isinstance(verifier.problem(bad), BadSignature)
