"""Opening a channel: a valid request, and the refusal for each single changed field (RBPCP §7.2)."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.channel import Accepted, CloseReason, Opening, Rejected, State, View
from paychan.protocol.errors import NotEconomical
from paychan.protocol.expiry import Expiry
from paychan.protocol.opening import open_channel
from paychan.protocol.payment import Payment
from paychan.protocol.terms import min_expiry
from paychan.protocol.types import OutPoint, Sat, UnixTime
from tests.lib.channels import NOW, RULES, VIEW, Payer
from tests.lib.ecdsa import high_s_twin
from tests.lib.looped import looped

PAYER = Payer("opening")
OTHER = Payer("other opening")
PAID = 10_000
VALID = msgspec.structs.replace(PAYER.opening(PAID), price_sat=Sat(PAID))
SIGNED = VALID.payment

replace = msgspec.structs.replace


def with_payment(**parts: Any) -> Opening:
    """The valid request with a part of its payment replaced."""
    return replace(VALID, payment=replace(SIGNED, **parts))


def with_terms(**parts: Any) -> Opening:
    """The valid request with a part of its terms replaced."""
    if "expiry" in parts:
        parts["expiry"] = Expiry(parts["expiry"])
    return replace(VALID, terms=replace(VALID.terms, **parts))


def code_of(opening: Opening, view: View = VIEW) -> str | None:
    """The refusal's code, or None."""
    outcome = open_channel(opening, view)
    return outcome.error.code if isinstance(outcome, Rejected) else None


def test_the_valid_opening_opens() -> None:
    """The unchanged request is accepted: the channel is open, with its first version and no counted payment."""
    outcome = open_channel(VALID, VIEW)

    assert isinstance(outcome, Accepted)
    channel = outcome.channel
    assert outcome.value_sat == PAID
    assert (channel.state, channel.seq, channel.payments, channel.opened_at) == (State.OPEN, 1, 0, NOW)
    assert (channel.terms, channel.outpoint, channel.funding_sat) == (VALID.terms, VALID.outpoint, VALID.funding_sat)
    assert (channel.payment, channel.change_script, channel.closing) == (SIGNED, VALID.change_script, None)


MUTATIONS = {
    "expiry too soon": (with_terms(expiry=min_expiry(VIEW)), "expiry_too_soon"),
    "other expiry": (with_terms(expiry=VALID.terms.expiry.lock_time + 1), "bad_signature"),
    "expiry after 2038": (with_terms(expiry=2**31), "bad_signature"),
    "other server key": (with_terms(server_key=OTHER.terms.server_key), "bad_signature"),
    "other client key": (with_terms(client_key=OTHER.terms.client_key), "bad_signature"),
    "keys swapped": (
        with_terms(server_key=VALID.terms.client_key, client_key=VALID.terms.server_key),
        "bad_signature",
    ),
    "other txid": (replace(VALID, outpoint=OutPoint(b"\x01" * 32, VALID.outpoint.vout)), "bad_signature"),
    "txid in the other order": (replace(VALID, outpoint=VALID.outpoint.reversed), "bad_signature"),
    "other index": (replace(VALID, outpoint=OutPoint(VALID.outpoint.txid, VALID.outpoint.vout + 1)), "bad_signature"),
    "funding below the change": (replace(VALID, funding_sat=Sat(SIGNED.change_sat - 1)), "value_backwards"),
    "funding a satoshi less": (replace(VALID, funding_sat=Sat(VALID.funding_sat - 1)), "payment_short"),
    "funding a satoshi more": (replace(VALID, funding_sat=Sat(VALID.funding_sat + 1)), None),
    "one confirmation too few": (replace(VALID, confirmations=RULES.min_confirmations - 1), "funding_unconfirmed"),
    "other change script": (replace(VALID, change_script=OTHER.change_script), "bad_signature"),
    "price a satoshi more": (replace(VALID, price_sat=Sat(PAID + 1)), "payment_short"),
    "price a satoshi less": (replace(VALID, price_sat=Sat(PAID - 1)), None),
    "other change value": (with_payment(change_sat=SIGNED.change_sat - 1), "bad_signature"),
    "dust change": (with_payment(change_sat=RULES.dust_sat - 1), "dust_change"),
    "no change under the flag for change": (with_payment(change_sat=0), "flag_mismatch"),
    "flag for no change": (with_payment(flag=0x82), "flag_mismatch"),
    "flag ALL": (with_payment(flag=0x01), "bad_flag"),
    "other signature": (with_payment(signature=OTHER.payment(SIGNED.change_sat).signature), "bad_signature"),
    "high S": (with_payment(signature=high_s_twin(SIGNED.signature)), "signature_encoding"),
    "signature cut": (with_payment(signature=SIGNED.signature[:-1]), "signature_encoding"),
    "secret": (replace(VALID, secret=b"\x01" * 32), None),
}


@looped(("opening", "code"), MUTATIONS.values(), ids=MUTATIONS)
def test_threat_2_one_changed_field_has_its_refusal(opening: Opening, code: str | None) -> None:
    """Each single changed field has its own refusal; a field that the payment does not sign changes only the value."""
    assert code_of(opening) == code


def test_every_field_is_mutated() -> None:
    """The cases above cover all fields of the request, its terms and its payment."""
    changed = {
        (part, name)
        for opening, _ in MUTATIONS.values()
        for part, mine, theirs in (
            ("opening", opening, VALID),
            ("terms", opening.terms, VALID.terms),
            ("payment", opening.payment, SIGNED),
        )
        for name in mine.__struct_fields__
        if getattr(mine, name) != getattr(theirs, name)
    } | {("terms", "tag")}  # another kind, in `tests/protocol/test_second_kind.py`
    fields = {"opening": Opening, "terms": type(VALID.terms), "payment": Payment}

    assert changed == {(part, name) for part, kind in fields.items() for name in kind.__struct_fields__}


@looped("late", [-1, 0, 1])
def test_threat_6_the_earliest_expiry_to_the_second(late: int) -> None:
    """An expiry must be later than now plus settlement period plus minimum duration (RBPCP §7.2)."""
    view = View(UnixTime(VALID.terms.expiry.lock_time - 86_400 - 3_600 + late), RULES)

    outcome = open_channel(VALID, view)

    assert isinstance(outcome, Rejected if late >= 0 else Accepted)
    if isinstance(outcome, Rejected):
        assert outcome.error.fields == {
            "got_unix": VALID.terms.expiry.lock_time,
            "need_unix": VALID.terms.expiry.lock_time + late,
        }


@given(
    less=st.integers(0, 1_000_000),
    price=st.integers(0, 1_000_000),
    confirmations=st.integers(0, 3),
    late=st.integers(-2, 2),
    frozen=st.booleans(),
)
def test_refusals_come_in_their_order(less: int, price: int, confirmations: int, late: int, frozen: bool) -> None:
    """If several fields are wrong, the first failing rule of RBPCP §5.2 gives the answer."""
    change = VALID.funding_sat - less
    view = View(
        UnixTime(NOW + VALID.terms.expiry.lock_time - min_expiry(VIEW) + late), RULES, "stale" if frozen else ""
    )
    opening = replace(VALID, payment=PAYER.payment(change), price_sat=Sat(price), confirmations=confirmations)
    rules = [
        (frozen, "chain_unavailable"),
        (late >= 0, "expiry_too_soon"),
        (confirmations < 1, "funding_unconfirmed"),
        (0 < change < RULES.dust_sat, "dust_change"),
        (less < price, "payment_short"),
    ]

    assert code_of(opening, view) == next((code for fails, code in rules if fails), None)


def test_refusals_hold_both_numbers() -> None:
    """The refusals of a short payment and of a missing confirmation have the received and the needed number."""
    short = open_channel(replace(VALID, price_sat=Sat(83_240)), VIEW)
    unconfirmed = open_channel(replace(VALID, confirmations=0), VIEW)

    assert isinstance(short, Rejected)
    assert str(short.error) == "payment short: got 10000 sat, need 83240 sat"
    assert isinstance(unconfirmed, Rejected)
    assert str(unconfirmed.error) == "funding not confirmed deep enough: got 0 confirmations, need 1"


def test_an_opening_payment_of_everything_opens_closing() -> None:
    """A payment without change opens a channel in CLOSING (RBPCP §5.2)."""
    outcome = open_channel(PAYER.opening(PAYER.funding_sat), VIEW)

    assert isinstance(outcome, Accepted)
    assert outcome.value_sat == PAYER.funding_sat
    assert (outcome.channel.state, outcome.channel.seq) == (State.CLOSING, 1)
    assert outcome.channel.closing is not None
    assert outcome.channel.closing.reason is CloseReason.DRAINED


def test_threat_13_an_opening_that_could_never_be_settled_is_refused() -> None:
    """A funding output below the cost of its own settlement has no value for the server."""
    payer = Payer("poor", funding_sat=Sat(800))

    outcome = open_channel(payer.opening(800), VIEW)

    assert isinstance(outcome, Rejected)
    assert isinstance(outcome.error, NotEconomical)
    assert outcome.error.fields["got_sat"] == 800
    assert outcome.error.fields["need_sat"] > 800
