"""The three steps of a payment: each result is the next one's argument, and their order is fixed."""

from __future__ import annotations

from hashlib import sha256

from msgspec.structs import replace

from paychan.protocol.channel import Accepted, Channel, Pay, Rejected, State, View
from paychan.protocol.errors import BadSignature, ChainUnavailable, ChannelClosing, ValueBackwards
from paychan.protocol.paying import Unverified, Verified, book, precheck, verify
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.state_machine import apply
from tests.lib.channels import RULES, Payer
from tests.lib.looped import looped

PAYER = Payer("steps")
CHANNEL = PAYER.channel()
NOW = View(CHANNEL.opened_at, RULES)


class Counting(PaymentVerifier):
    """A verifier that counts its checks."""

    checks = 0

    def problem(self, *args: object):  # type: ignore[no-untyped-def,override]
        self.checks += 1
        return super().problem(*args)  # type: ignore[arg-type]


def counting(channel: Channel) -> Counting:
    return Counting(channel.terms, channel.outpoint, channel.funding_sat, channel.change_script)


def paid(more_sat: int) -> Pay:
    return Pay(PAYER.payment(CHANNEL.payment.change_sat - more_sat))


def test_the_steps_in_sequence_are_the_machine() -> None:
    """A payment that passes the three steps leaves the record that `apply` leaves."""
    unverified = precheck(CHANNEL, paid(5), NOW)
    assert isinstance(unverified, Unverified)
    verified = verify(unverified, CHANNEL.verifier())
    assert isinstance(verified, Verified)
    assert book(verified) == apply(CHANNEL, paid(5), NOW)


def test_each_signature_is_checked_once_and_only_after_the_precheck() -> None:
    """A payment that the channel can't accept now costs no signature check; another one costs exactly one."""
    verifier = counting(CHANNEL)
    frozen, closing = replace(NOW, frozen="no blocks"), replace(CHANNEL, state=State.CLOSING)
    assert precheck(CHANNEL, paid(5), frozen) == Rejected(ChainUnavailable(reason="no blocks"))
    assert precheck(closing, paid(5), NOW) == Rejected(ChannelClosing())
    assert isinstance(apply(CHANNEL, paid(5), frozen, verifier), Rejected)
    assert verifier.checks == 0
    assert isinstance(apply(CHANNEL, paid(5), NOW, verifier), Accepted)
    assert verifier.checks == 1


def test_a_repetition_is_accepted_without_a_check_and_changes_nothing() -> None:
    assert precheck(CHANNEL, Pay(CHANNEL.payment), NOW) == Accepted(CHANNEL)


def test_a_bad_signature_never_becomes_a_verified_payment() -> None:
    good, other = paid(5).payment, paid(6).payment
    unverified = precheck(CHANNEL, Pay(Payment(good.change_sat, other.signature, good.flag)), NOW)
    assert isinstance(unverified, Unverified)
    assert verify(unverified, CHANNEL.verifier()) == Rejected(BadSignature(change_sat=good.change_sat))


@looped("less_sat", [1, 100])
def test_numbers_are_named_only_after_the_check(less_sat: int) -> None:
    """A payment of less is refused by `book`, with both numbers: the first two steps do not name the channel's."""
    ahead = apply(CHANNEL, paid(500), NOW)
    assert isinstance(ahead, Accepted)
    unverified = precheck(ahead.channel, paid(500 - less_sat), NOW)
    assert isinstance(unverified, Unverified)
    verified = verify(unverified, CHANNEL.verifier())
    assert isinstance(verified, Verified)
    newest = ahead.channel.payment
    change_sat, proof = newest.change_sat, sha256(newest.signature).hexdigest()
    refusal = ValueBackwards(got_sat=change_sat + less_sat, need_sat=change_sat, newest_sha256=proof)
    assert book(verified) == Rejected(refusal)
