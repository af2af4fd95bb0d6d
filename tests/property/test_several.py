"""Several payments at once, compared with one by one: the same outcomes, the same channel."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.channel import Accepted, Channel, Close, CloseReason, Outcome, Pay, Rejected, State, View
from paychan.protocol.errors import BadSignature
from paychan.protocol.payment import Payment, PaymentVerifier
from paychan.protocol.payment_batch import (
    MOST_CHECKS,
    Commands,
    commands_after,
    ends_with_bad_signature,
    judge,
    newest_of,
)
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.payment_frames import read_payments, write_payments
from tests.lib.channels import NOW, RULES, VIEW, Payer, step

PAYER = Payer("several")
OPENED = PAYER.channel()
VERIFIER = PaymentVerifier(PAYER.terms, PAYER.outpoint, PAYER.funding_sat, PAYER.change_script)
OTHER = Payer("another payer")

changes = st.sampled_from([990_001, 990_000, 989_999, 989_990, 500_000, 20_000, 600, 546, 545, 1, 0])
good = changes.map(PAYER.payment)
bad = st.one_of(
    changes.map(OTHER.payment),
    changes.map(lambda change: Payment(Sat(change), PAYER.payment(5_000).signature, 0x82 if change == 0 else 0x83)),
    changes.map(lambda change: Payment(Sat(change), b"garbage!", 0x83)),
    changes.map(lambda change: msgspec.structs.replace(PAYER.payment(change), flag=0x81)),
)
falling = st.lists(changes, max_size=8).map(lambda all_: [PAYER.payment(each) for each in sorted(all_, reverse=True)])
views = st.sampled_from(
    [
        VIEW,
        View(NOW, RULES, "the chain is stale"),
        View(UnixTime(PAYER.expiry), RULES),
        View(NOW, msgspec.structs.replace(RULES, dust_sat=Sat(30_000))),
    ]
)
channels = st.sampled_from(
    [
        OPENED,
        PAYER.pay(OPENED, 10),
        step(OPENED, Close(CloseReason.OPERATOR)),
        msgspec.structs.replace(OPENED, offered=PAYER.payment(989_000)),
    ]
)


def one_by_one(channel: Channel, payments: list[Payment], view: View) -> list[Outcome]:
    """The plain path: each payment is a separate command."""
    outcomes: list[Outcome] = []
    for payment in payments:
        outcome = apply(channel, Pay(payment), view, VERIFIER)
        if isinstance(outcome, Accepted):
            channel = outcome.channel
        outcomes.append(outcome)
    return outcomes


def together(channel: Channel, payments: list[Payment], view: View, *, coalesce: bool) -> list[Outcome]:
    """Judge them at once; if a compact frame can hold them, judge that too: the outcomes must be equal."""
    outcomes = judge(channel, [Pay(payment) for payment in payments], view, VERIFIER, coalesce=coalesce)
    assert len(outcomes) == len(payments)
    if payments and all(_is_compact(payment) for payment in payments):
        compact = judge(channel, read_payments(write_payments(payments)), view, VERIFIER, coalesce=coalesce)
        assert list(compact) == list(outcomes)
        assert newest_of(compact) == newest_of(outcomes)
    return list(outcomes)


@given(channels, st.lists(good | bad, max_size=8) | falling, views)
def test_without_coalescing_several_payments_are_the_plain_path(
    channel: Channel, payments: list[Payment], view: View
) -> None:
    """Valid, bad, stale, dust and draining payments, in any order, on any channel at any time: the same outcomes."""
    assert together(channel, payments, view, coalesce=False) == one_by_one(channel, payments, view)


@given(channels, st.lists(good | bad, max_size=8) | falling, views)
def test_fault_69_parts_are_the_plain_path_and_end_at_bad_signatures(
    channel: Channel, payments: list[Payment], view: View
) -> None:
    """A batch judged in parts has the same outcomes; only the last outcome of a part is a bad signature."""
    commands: Commands = [Pay(payment) for payment in payments]
    outcomes: list[Outcome] = []
    now = channel
    while commands:
        part = judge(now, commands, view, VERIFIER, coalesce=False, in_part=True)
        assert 0 < len(part) <= MOST_CHECKS
        assert ends_with_bad_signature(part) == _has_bad_signature(part[-1])
        assert not any(map(_has_bad_signature, part[:-1]))
        outcomes += part
        now, commands = newest_of(part) or now, commands_after(commands, len(part))
    assert outcomes == one_by_one(channel, payments, view)


def _has_bad_signature(outcome: Outcome) -> bool:
    return isinstance(outcome, Rejected) and isinstance(outcome.error, BadSignature)


@given(channels, st.lists(good, max_size=8) | falling, views)
def test_coalescing_changes_nothing_for_valid_signatures(channel: Channel, payments: list[Payment], view: View) -> None:
    """Payments with valid signatures, in any order and of any value, have the outcomes of the plain path."""
    assert together(channel, payments, view, coalesce=True) == one_by_one(channel, payments, view)


@given(channels, st.lists(good | bad, max_size=8), views)
def test_coalescing_credits_and_keeps_what_the_plain_path_does(
    channel: Channel, payments: list[Payment], view: View
) -> None:
    """With bad signatures among them the sum of the values, the stored payment and the state are the same.

    The one difference: a bad signature that a later valid payment covers is not detected.
    """
    outcomes, plain = together(channel, payments, view, coalesce=True), one_by_one(channel, payments, view)
    now, then = newest_of(outcomes) or channel, newest_of(plain) or channel
    assert _total(outcomes) == _total(plain)
    assert (now.payment, now.state, now.closing) == (then.payment, then.state, then.closing)
    assert VERIFIER.problem(now.payment) is None
    differing = [n for n in range(len(plain)) if outcomes[n] != plain[n]]
    assert not differing or VERIFIER.problem(payments[differing[0]]) is not None


@given(st.lists(st.integers(546, 990_000), min_size=2, max_size=8, unique=True), st.data())
def test_a_bad_newest_payment_covers_nothing(row: list[int], data: st.DataObject) -> None:
    """If the newest does not verify, the earlier ones are checked one by one."""
    payments = [PAYER.payment(change) for change in sorted(row, reverse=True)]
    payments[-1] = msgspec.structs.replace(payments[-1], signature=OTHER.payment(5_000).signature)
    at = data.draw(st.integers(0, len(payments) - 2))
    payments[at] = msgspec.structs.replace(payments[at], signature=OTHER.payment(5_000).signature)
    assert together(OPENED, payments, VIEW, coalesce=True) == one_by_one(OPENED, payments, VIEW)


def test_only_the_newest_of_falling_payments_is_verified() -> None:
    """Sixteen payments cost one check: the signatures of the fifteen before the newest may be invalid."""
    honest = [PAYER.payment(990_000 - n) for n in range(1, 17)]
    unsigned = [msgspec.structs.replace(each, signature=b"garbage!") for each in honest[:-1]]
    outcomes = together(OPENED, [*unsigned, honest[-1]], VIEW, coalesce=True)
    assert [outcome.value_sat for outcome in outcomes if isinstance(outcome, Accepted)] == [1] * 16
    kept = newest_of(outcomes)
    assert kept == newest_of(one_by_one(OPENED, honest, VIEW))
    assert newest_of(one_by_one(OPENED, unsigned, VIEW)) is None


def test_a_draining_payment_is_checked_by_itself() -> None:
    """A payment without change closes the channel, and later payments are refused as usual."""
    row = [PAYER.payment(change) for change in (980_000, 970_000, 0, 0)]
    outcomes = together(OPENED, row, VIEW, coalesce=True)
    assert outcomes == one_by_one(OPENED, row, VIEW)
    kept = newest_of(outcomes)
    assert kept is not None
    assert kept.state is State.CLOSING


def _is_compact(payment: Payment) -> bool:
    """Say whether a binary frame can hold it: a real signature, with the flag that follows from the change value."""
    return payment.signature[0] == 0x30 and read_payments(write_payments([payment]))[0] == payment


def _total(outcomes: list[Outcome]) -> int:
    return sum(outcome.value_sat for outcome in outcomes if isinstance(outcome, Accepted))


def test_a_lone_payment_is_always_checked() -> None:
    """No newer payment could cover it."""
    lone = [msgspec.structs.replace(PAYER.payment(980_000), signature=OTHER.payment(5_000).signature)]
    (outcome,) = together(OPENED, lone, VIEW, coalesce=True)
    assert getattr(outcome, "error", None) == BadSignature(change_sat=980_000)
