"""The project's verdicts against Bitcoin Core's interpreter, and settlements of many channels (threats 15, 17, 19)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import msgspec
from bitcoin.core import CTransaction
from hypothesis import given, settings
from hypothesis import strategies as st

from paychan.protocol.address import key_script
from paychan.protocol.expiry import MAX_EXPIRY, MIN_EXPIRY
from paychan.protocol.fees import Shortfall, plan_fee
from paychan.protocol.kinds.refund import sign_refund
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.settlement import Claim, settlement_size, sign_settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime
from tests.lib.channels import RULES, Payer, private_key, scripts_of
from tests.lib.ecdsa import high_s_twin
from tests.lib.kernel import interpreter_accepts

DUST = Sat(700)
ALL_OF_IT = msgspec.structs.replace(RULES, dust_sat=DUST)
"""Rules by which all received value may become fee."""
DESTINATION = key_script(private_key("destination").public_key.format())

expiries = st.sampled_from([MIN_EXPIRY, UnixTime(2**31 - 1), UnixTime(2**31), MAX_EXPIRY]) | st.integers(
    MIN_EXPIRY, MAX_EXPIRY
).map(UnixTime)
fundings = st.integers(10_000, 21 * 10**14).map(Sat)


class EachChange(Payer, frozen=True):
    """A payer whose change address is of a type that depends on its seed."""

    @property
    def change_script(self) -> bytes:
        scripts = list(scripts_of(self.key.public_key.format()).values())
        return scripts[int(self.seed) % len(scripts)]


payers = st.builds(EachChange, st.integers(0, 10**6).map(str), expiries, fundings)


def claim_of(payer: Payer, payment: Payment) -> Claim:
    """The claim of a payer's channel after a payment."""
    return Claim(payer.terms, payer.outpoint, payer.funding_sat, payer.change_script, payment)


def settle(payers: Sequence[Payer], claims: Sequence[Claim], fee_sat: Sat) -> bytes:
    """A settlement, signed by each channel's server key."""
    return sign_settlement(
        claims, DESTINATION, fee_sat, lambda index, digest: payers[index].server_key.sign(digest, hasher=None)
    ).transaction


@st.composite
def payers_and_payments(draw: st.DrawFn) -> tuple[Payer, Payment]:
    """A payer with one of its payments, which may have been changed after signing."""
    payer = draw(payers)
    change = draw(st.sampled_from([0, 700]) | st.integers(700, payer.funding_sat - 5_000))
    good = payer.payment(change)
    damage = draw(st.sampled_from(["", "", "byte", "value", "output", "script", "terms", "high S", "cut", "other key"]))
    signature = bytearray(good.signature)
    if damage == "byte":
        signature[draw(st.integers(0, len(signature) - 1))] = draw(st.integers(0, 255))
    elif damage == "high S":
        signature = bytearray(high_s_twin(good.signature))
    elif damage == "cut":
        del signature[draw(st.integers(8, len(signature) - 1)) :]
    elif damage == "other key":
        signature = bytearray(Payer("else", payer.expiry, payer.funding_sat).payment(change).signature)
    elif damage == "value" and change:
        change += draw(st.sampled_from([-1, 1, 256]))
    elif damage == "output":
        payer = Elsewhere(payer.seed, payer.expiry, payer.funding_sat)
    elif damage == "script":
        payer = OtherChange(payer.seed, payer.expiry, payer.funding_sat)
    elif damage == "terms":
        payer = Payer(payer.seed, UnixTime(payer.expiry ^ 1), payer.funding_sat)
    return payer, Payment(Sat(change), bytes(signature), good.flag)


class Elsewhere(Payer, frozen=True):
    """The same payer with another funding output."""

    @property
    def outpoint(self) -> OutPoint:
        return OutPoint(super().outpoint.txid, 7)


class OtherChange(Payer, frozen=True):
    """The same payer with another change address."""

    @property
    def change_script(self) -> bytes:
        return self.terms.funding_script


@given(payers_and_payments())
def test_threat_17_a_payment_verifies_iff_core_takes_its_settlement(case: tuple[Payer, Payment]) -> None:
    """Core accepts the settlement iff the project accepts the payment; except for high S, which is not relayed."""
    payer, payment = case
    problem = PaymentVerifier(payer.terms, payer.outpoint, payer.funding_sat, payer.change_script).problem(payment)

    raw = settle([payer], [claim_of(payer, payment)], Sat(1_000))
    valid = interpreter_accepts(payer.terms.funding_script, raw, 0, payer.funding_sat)

    if problem is not None and problem.fields.get("reason") == "S is in the upper half":
        return
    assert (problem is None) == valid


@given(payers, st.integers(0, 9_000))
def test_refunds_are_valid(payer: Payer, fee: int) -> None:
    """The client of every channel can get its coins back, for any keys, expiry and value."""
    refund = sign_refund(payer.key, payer.terms, payer.outpoint, payer.funding_sat, DESTINATION, Sat(fee))

    assert interpreter_accepts(payer.terms.funding_script, refund.transaction, 0, payer.funding_sat)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[Payer, int]]:
    """One to four channels, at most one with change; payer and change value of each."""
    seeds = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True))
    drawn = [(EachChange(str(seed), draw(expiries), draw(fundings)), 0) for seed in seeds]
    if draw(st.booleans()):
        payer = drawn[0][0]
        drawn[0] = (payer, draw(st.integers(DUST, payer.funding_sat)))
    return drawn


@settings(max_examples=40)
@given(batches(), st.integers(1, 50))
def test_threat_15_every_order_of_a_batch_is_valid_or_refused(batch: list[tuple[Payer, int]], rate: int) -> None:
    """A batch is valid in every order with the change first, and is refused in any other order."""
    for order in permutations(batch):
        claims = [claim_of(payer, payer.payment(change)) for payer, change in order]
        if any(change for _, change in order[1:]):
            assert_refused(claims)
            continue
        fee = plan_fee(claims, DESTINATION, rate, ALL_OF_IT)
        if isinstance(fee, Shortfall):
            continue
        raw = settle([payer for payer, _ in order], claims, fee)
        for index, claim in enumerate(claims):
            assert interpreter_accepts(claim.terms.funding_script, raw, index, claim.funding_sat)


def assert_refused(claims: Sequence[Claim]) -> None:
    """A batch that can't be signed can't be planned either."""
    try:
        plan_fee(claims, DESTINATION, 1, ALL_OF_IT)
    except ValueError:
        return
    raise AssertionError(claims)


@given(batches(), st.integers(0, 2_000), st.integers(0, 10**15), st.booleans())
def test_threat_13_fees_and_outputs_add_up(
    batch: list[tuple[Payer, int]], rate: int, client_fee: int, may_give_all: bool
) -> None:
    """Outputs and fee equal the inputs; the fee is between relay floor and received value; no output is dust."""
    claims = [claim_of(payer, payer.payment(change)) for payer, change in batch]
    received = sum(claim.received_sat for claim in claims)

    fee = plan_fee(claims, DESTINATION, rate, ALL_OF_IT, client_fee_sat=Sat(client_fee), may_give_all=may_give_all)

    if isinstance(fee, Shortfall):
        assert (fee.received_sat, fee.needed_sat > received) == (received, True)
        return
    raw = settle([payer for payer, _ in batch], claims, fee)
    values = [out.nValue for out in CTransaction.deserialize(raw).vout]
    assert sum(values) + fee == sum(claim.funding_sat for claim in claims)
    assert len(raw) <= fee <= received
    assert min(values) >= DUST


@given(batches(), st.integers(1, 2_000), st.integers(0, 10**15))
def test_threat_31_a_client_can_not_make_the_fee_absurd(
    batch: list[tuple[Payer, int]], rate: int, client_fee: int
) -> None:
    """For any offer of a closing payment the settlement pays at most the cap of the rate.

    Otherwise the signer's fee policy would refuse to sign it until the client's refund is valid.
    """
    claims = [claim_of(payer, payer.payment(change)) for payer, change in batch]

    fee = plan_fee(claims, DESTINATION, rate, ALL_OF_IT, client_fee_sat=Sat(client_fee))

    assert isinstance(fee, Shortfall) or fee <= max(rate, ALL_OF_IT.max_fee_sat_per_vb) * settlement_size(
        claims, DESTINATION
    )
