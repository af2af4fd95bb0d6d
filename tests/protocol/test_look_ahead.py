"""A signature may be checked before its payment is judged; what the judge hears is the same."""

from __future__ import annotations

from paychan.protocol.errors import BadSignature
from paychan.protocol.payment import Payment, PaymentVerifier
from tests.lib.rbpcp import Payer


def test_what_was_seen_ahead_is_told_for_that_payment_alone() -> None:
    """Good stays good and bad stays bad, also when another payment was looked at in between, or an equal one is asked."""
    payer = Payer()
    good, other = payer.payment(100_001), payer.payment(100_002)
    bad = Payment(good.change_sat, other.signature, good.flag)
    verifier = PaymentVerifier(payer.terms, payer.outpoint, payer.change_script)
    for ahead in (good, other, bad):
        for asked in (good, other, bad, Payment(bad.change_sat, bad.signature, bad.flag)):
            verifier.look_ahead(ahead)
            assert (verifier.problem(asked) is None) is (asked in (good, other))
            assert isinstance(verifier.problem(bad), BadSignature)
