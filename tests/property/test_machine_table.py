"""All states with all commands, from real records: which facts may change, and which transitions exist."""

from __future__ import annotations

from itertools import product
from typing import get_args

import msgspec
import pytest

from paychan.protocol.channel import (
    Accepted,
    Adopt,
    Answer,
    Channel,
    Close,
    CloseByPayment,
    CloseByProof,
    CloseReason,
    Command,
    Confirmed,
    Found,
    Funded,
    Kept,
    Pay,
    Published,
    Rejected,
    Signed,
    SpentElsewhere,
    State,
    Step,
    TakenBack,
    Unanswered,
    Unfunded,
    Vanished,
    View,
    next_step,
)
from paychan.protocol.charges import Charge, Delivered, Release
from paychan.protocol.errors import ChainUnavailable, ChannelMoved
from paychan.protocol.payment import Payment, sign_payment
from paychan.protocol.record import decode_record, encode_record
from paychan.protocol.settlement import Settlement
from paychan.protocol.state_machine import TRANSITIONS, apply
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.withdrawing import can_withdraw
from tests.lib.channels import RULES, SERVER_DESTINATION, VIEW, Payer, confirmed, step
from tests.lib.looped import looped
from tests.vectors.record.generate import samples

ARROWS = {
    (State.OPEN, State.CLOSING),
    (State.CLOSING, State.PUBLISHED),
    (State.PUBLISHED, State.CLOSED),
    (State.PUBLISHED, State.CLOSING),
    (State.CLOSED, State.CLOSING),
    (State.OPEN, State.LOST),
    (State.CLOSING, State.LOST),
    (State.PUBLISHED, State.LOST),
    (State.CLOSED, State.LOST),
    (State.UNFUNDED, State.LOST),
    (State.LOST, State.CLOSING),
    (State.OPEN, State.UNFUNDED),
    (State.CLOSING, State.UNFUNDED),
    (State.PUBLISHED, State.UNFUNDED),
    (State.UNFUNDED, State.OPEN),
    (State.UNFUNDED, State.CLOSING),
    (State.OPEN, State.PUBLISHED),
    (State.CLOSING, State.OPEN),
    (State.CLOSED, State.PUBLISHED),
    (State.LOST, State.PUBLISHED),
    (State.UNFUNDED, State.PUBLISHED),
}
"""The arrows of the diagram in `state_machine.py`: each one is taken, and no other."""

asking = msgspec.structs.replace(RULES, asks_application=True)
SAMPLES = samples()
VIEWS = {
    "usual": VIEW,
    "frozen": View(VIEW.now, RULES, frozen="no tip for an hour"),
    "late": View(UnixTime(2**32 - 1), RULES),
    "asking": View(VIEW.now, asking),
}


def owner(channel: Channel) -> Payer:
    """The client of a sample."""
    movable = channel.change_script == channel.terms.funding_script
    return Payer("frozen sample", channel.terms.expiry.lock_time, movable=movable, at=channel.outpoint)


def dearer(channel: Channel) -> Settlement:
    """A settlement at twice the rate of the channel's."""
    assert channel.closing is not None
    assert channel.closing.settlement is not None
    paid = channel.closing.settlement
    return msgspec.structs.replace(paid, fee_sat=Sat(2 * paid.fee_sat), txid=b"\x13" * 32)


def found(channel: Channel, payer: Payer, less: int, *, deep: bool) -> Found:
    """A settlement of the server that leaves the client `less` satoshi less than the record."""
    payment = payer.payment(max(channel.payment.change_sat - less, 0))
    claim = msgspec.structs.replace(channel.claim, payment=payment)
    return Found(claim, Settlement(bytes(200), bytes([less % 256]) * 32, Sat(300)), deep)


def commands(channel: Channel) -> list[Command]:
    """Commands of every kind for a channel, valid and invalid ones."""
    payer = owner(channel)
    change = channel.payment.change_sat
    other_signer = Payer("another payer", channel.terms.expiry.lock_time)
    payments = [payer.payment(max(change - less, 0)) for less in (-1, 0, 1, 1_000, change)]
    payments += [payer.payment(1), other_signer.payment(change), Payment(Sat(change), payments[1].signature, 0x01)]
    plain = Payer("frozen sample", channel.terms.expiry.lock_time)
    settlement = plain.settlement(step(plain.channel(), Close(CloseReason.OPERATOR)))
    elsewhere = sign_payment(
        payer.key, payer.terms, payer.outpoint, payer.funding_sat, SERVER_DESTINATION, Sat(max(change - 5_000, 0))
    )
    return [
        *(Pay(payment) for payment in payments),
        *(
            Charge(request, Sat(100), payment)
            for request in (b"\x02" * 16, b"\x03" * 16)
            for payment in (None, *payments)
        ),
        Charge(b"\x03" * 16, Sat(0)),
        Charge(b"\x03" * 16, Sat(10**9), payments[-1]),
        *(Release(bytes([number]) * 16, Sat(10)) for number in (1, 2, 3)),
        Delivered(frozenset([b"\x02" * 16])),
        *(CloseByProof(payment) for payment in payments),
        *(CloseByPayment(payment) for payment in payments),
        CloseByPayment(elsewhere, SERVER_DESTINATION),
        *(Close(reason) for reason in CloseReason),
        Answer(),
        Answer("sold out"),
        Signed(settlement),
        *([Signed(dearer(channel))] if channel.closing and channel.closing.settlement else []),
        Published(),
        *([Kept(channel.closing.settlement)] if channel.closing and channel.closing.settlement else [Kept(settlement)]),
        *([confirmed(channel)] if channel.closing and channel.closing.settlement else []),
        Confirmed(b"\x12" * 32),
        Vanished(),
        TakenBack(ChainUnavailable(reason="refused")),
        Unanswered(),
        SpentElsewhere(b"\x11" * 32),
        *(Adopt(msgspec.structs.replace(channel.claim, payment=payment), settlement) for payment in payments),
        Adopt(msgspec.structs.replace(channel.claim, payment=elsewhere, change_script=SERVER_DESTINATION), settlement),
        *(found(channel, payer, less, deep=deep) for less in (-1, 0, 1_000) for deep in (False, True)),
        Unfunded(),
        Funded(),
    ]


CASES = [
    pytest.param(channel, view, id=f"{name}-{view_name}")
    for (name, channel), (view_name, view) in product(SAMPLES.items(), VIEWS.items())
]
each_case = looped(("channel", "view"), CASES)


def test_the_table_is_total() -> None:
    """Every state has a transition for every command."""
    assert set(TRANSITIONS) == set(State)
    for row in TRANSITIONS.values():
        assert set(row) == set(get_args(Command))


def test_the_samples_try_every_cell() -> None:
    """The tests below try records of all states with commands of all kinds."""
    assert {channel.state for channel in SAMPLES.values()} == set(State)
    assert {type(command) for command in commands(SAMPLES["open"])} == set(get_args(Command))


@each_case
def test_no_command_changes_fixed_facts(channel: Channel, view: View) -> None:
    """Fixed facts stay, change never rises, the number of payments never falls, and the input record is untouched."""
    before = encode_record(channel)
    for command in commands(channel):
        outcome = apply(channel, command, view)

        assert encode_record(channel) == before
        if isinstance(outcome, Accepted):
            after = outcome.channel
            for fact in ("terms", "outpoint", "funding_sat", "secret", "opened_at"):
                assert getattr(after, fact) == getattr(channel, fact)
            assert after.payment.change_sat <= channel.payment.change_sat
            assert after.payments - channel.payments in {0, 1}
            assert after.accepted_sat >= channel.accepted_sat
            assert 0 <= after.spent_sat <= after.accepted_sat
            assert outcome.value_sat >= 0
            assert decode_record(encode_record(after)) == after


@each_case
def test_sequence_number_counts_changes(channel: Channel, view: View) -> None:
    """It grows by exactly one if the record changes; an unchanged record is the same object."""
    for command in commands(channel):
        outcome = apply(channel, command, view)
        if isinstance(outcome, Accepted) and outcome.channel is not channel:
            assert outcome.channel.seq == channel.seq + 1
            assert msgspec.structs.replace(outcome.channel, seq=channel.seq) != channel


@each_case
def test_settling_is_never_undone(channel: Channel, view: View) -> None:
    """Only a higher fee, a newer claim or the chain replaces a settlement; the start time of closing stays."""
    if channel.closing is None:
        return
    for command in commands(channel):
        outcome = apply(channel, command, view)
        if isinstance(outcome, Accepted):
            if isinstance(command, TakenBack) and channel.moves and channel.closing.settlement is None:
                continue  # no settlement is signed
            after = outcome.channel.closing
            assert after is not None
            assert after.begun_at == channel.closing.begun_at
            before = channel.closing.settlement
            if isinstance(command, Found):
                assert before is None or after.settlement in (before, command.settlement)
                continue
            assert after.reason == channel.closing.reason
            assert after.settlement is not None or before is None
            if before is not None and outcome.channel.payment == channel.payment:
                assert after.settlement == before or after.settlement.is_dearer_than(before)


@each_case
def test_next_step_fits_the_record(channel: Channel, view: View) -> None:
    """Every resulting record has the facts that its next step needs."""
    for command in commands(channel):
        outcome = apply(channel, command, view)
        after = outcome.channel if isinstance(outcome, Accepted) else channel
        signed = after.closing is not None and after.closing.settlement is not None

        assert (
            next_step(after)
            == {
                State.OPEN: None if after.offered is None else Step.OFFER,
                State.CLOSING: Step.OFFER if after.offered else Step.PUBLISH if signed else Step.SIGN,
                State.PUBLISHED: Step.WATCH,
                State.CLOSED: None,
                State.LOST: None,
                State.UNFUNDED: None,
            }[after.state]
        )
        assert (after.closing is None) == (after.state is State.OPEN) or after.state is State.UNFUNDED
        assert signed or after.state not in {State.PUBLISHED, State.CLOSED}
        assert after.offered is None or after.state in (State.OPEN, State.CLOSING, State.UNFUNDED)
        assert not after.offered_data or after.offered is not None


@each_case
def test_a_kept_verifier_changes_no_verdict(channel: Channel, view: View) -> None:
    """The verifier that an actor keeps only saves work, also if a closing payment names another change address."""
    verifier = channel.verifier()
    for command in commands(channel):
        assert apply(channel, command, view, verifier) == apply(channel, command, view)


def test_states_move_only_along_the_drawn_arrows() -> None:
    """All commands on all records take exactly the arrows of the diagram."""
    taken = set()
    for channel, view in product(SAMPLES.values(), VIEWS.values()):
        for command in commands(channel):
            outcome = apply(channel, command, view)
            if isinstance(outcome, Accepted) and outcome.channel.state is not channel.state:
                taken.add((channel.state, outcome.channel.state))

    assert taken == ARROWS


@looped("name", [name for name, channel in SAMPLES.items() if channel.state is not State.OPEN])
def test_threat_4_nothing_opens_a_channel_again(name: str) -> None:
    """Outside OPEN no command brings value, and only returned funding leads back to OPEN."""
    channel = SAMPLES[name]
    for command, view in product(commands(channel), VIEWS.values()):
        outcome = apply(channel, command, view)
        if isinstance(outcome, Accepted):
            taken_back = isinstance(command, TakenBack) and channel.state is State.CLOSING and channel.moves
            there_after_all = (channel.state, command) == (State.UNFUNDED, Funded())
            assert outcome.channel.state is not State.OPEN or there_after_all or taken_back
            assert outcome.channel.payment == channel.payment or isinstance(command, (Adopt, Found)) or channel.offered
            assert outcome.value_sat == 0 or channel.offered
            chains = (Found, Vanished, SpentElsewhere)
            assert outcome.channel is channel or channel.state is not State.LOST or isinstance(command, chains)


@looped("name", SAMPLES)
def test_threat_3_a_frozen_server_takes_no_payment(name: str) -> None:
    """Without a reliable chain view the server accepts no payment, but closes channels."""
    channel = SAMPLES[name]
    for command in commands(channel):
        outcome = apply(channel, command, VIEWS["frozen"])
        if isinstance(command, Pay | Charge):
            assert isinstance(outcome, Rejected)
            assert (outcome.error.code == ChainUnavailable.code) == (channel.state is State.OPEN)
        else:
            assert outcome == apply(channel, command, VIEW)


def test_threat_6_a_late_channel_takes_no_payment_and_still_closes() -> None:
    """Payments end at the exact second at which the settlement period begins."""
    payer = Payer("late")
    channel = payer.channel()
    limit = channel.terms.expiry.lock_time - RULES.settlement_period_seconds
    pay = Pay(payer.payment(channel.payment.change_sat - 1))

    before = apply(channel, pay, View(UnixTime(limit - 1), RULES))
    after = apply(channel, pay, View(UnixTime(limit), RULES))

    assert isinstance(before, Accepted)
    assert isinstance(after, Rejected)
    assert after.error.fields == {"now_unix": limit, "limit_unix": limit}
    assert isinstance(apply(channel, Close(CloseReason.EXPIRY), View(UnixTime(limit), RULES)), Accepted)


@looped("close", [CloseByProof, CloseByPayment])
def test_fault_14_a_client_closes_although_its_payment_is_offered(close: type[CloseByProof | CloseByPayment]) -> None:
    """A silent application can't keep a client: a close by the payment before the offered one drops the offer."""
    channel = SAMPLES["open_offered"]

    outcome = apply(channel, close(channel.payment), VIEW)

    assert isinstance(outcome, Accepted)
    assert (outcome.channel.state, outcome.channel.offered) == (State.CLOSING, None)
    assert outcome.channel.payment == channel.payment


@looped("close", [CloseByProof, CloseByPayment])
def test_fault_14_a_client_that_shows_the_offered_payment_pays_it(close: type[CloseByProof | CloseByPayment]) -> None:
    """The client's confirmation needs no answer of the application; only the value beyond the offer is a fee."""
    channel = SAMPLES["open_offered"]
    assert channel.offered is not None

    outcome = apply(channel, close(channel.offered), VIEW)

    assert isinstance(outcome, Accepted)
    assert outcome.channel.closing is not None
    assert (outcome.channel.payment, outcome.channel.payments) == (channel.offered, channel.payments + 1)
    assert outcome.channel.closing.client_fee_sat == 0


def asked(now: int, *, counts: bool = True) -> View:
    return View(UnixTime(now), msgspec.structs.replace(RULES, asks_application=True, unanswered_counts=counts))


@looped("counts", [True, False])
def test_fault_7_the_rule_decides_about_silence_but_only_late(counts: bool) -> None:
    """The server asks until half of the time is over; then the rule settles or drops the offered payment."""
    channel = SAMPLES["closing_offered"]
    assert channel.closing is not None
    assert channel.offered is not None
    begun = channel.closing.begun_at
    half = begun + (channel.terms.expiry.lock_time - RULES.deadline_margin_seconds - begun + 1) // 2

    early = apply(channel, Unanswered(), asked(half - 1, counts=counts))
    late = apply(channel, Unanswered(), asked(half, counts=counts))

    assert early == Accepted(channel)
    assert isinstance(late, Accepted)
    assert late.channel.payment == (channel.offered if counts else channel.payment)
    assert next_step(late.channel) is Step.SIGN


@looped("refusal", ["", "sold out"])
def test_fault_7_a_late_answer_counts_while_the_channel_closes(refusal: str) -> None:
    """A yes after the timeout settles the payment, a no drops it; no settlement is signed before."""
    channel = SAMPLES["closing_offered"]
    assert next_step(channel) is Step.OFFER

    outcome = apply(channel, Answer(refusal), VIEW)

    assert isinstance(outcome, Accepted)
    assert outcome.channel.payment == (channel.payment if refusal else channel.offered)
    assert next_step(outcome.channel) is Step.SIGN


def test_fault_7_an_offered_payment_makes_a_channel_worth_settling() -> None:
    """Even if the other received value does not pay for a settlement, the channel closes, and the server asks."""
    payer = Payer("poor")
    offered = apply(payer.channel(paid_sat=100), Pay(payer.payment(payer.funding_sat - 60_000)), asked(VIEW.now))
    assert isinstance(offered, Accepted)

    outcome = apply(offered.channel, Close(CloseReason.EXPIRY), VIEW)

    assert isinstance(outcome, Accepted)
    assert outcome.channel.offered == offered.channel.offered


def test_fault_07_an_offered_payment_outlives_funding_that_was_gone() -> None:
    """A reorg removes the funding output and brings it back: the offered payment, perhaps delivered, is still there."""
    gone = apply(SAMPLES["open_offered"], Unfunded(), asked(VIEW.now))
    assert isinstance(gone, Accepted)
    assert next_step(gone.channel) is None

    back = apply(gone.channel, Funded(), asked(VIEW.now))
    late_yes = apply(gone.channel, Answer(""), asked(VIEW.now))

    assert isinstance(back, Accepted)
    assert (back.channel.state, back.channel.offered) == (State.OPEN, SAMPLES["open_offered"].offered)
    assert isinstance(late_yes, Accepted)
    assert late_yes.channel.payment == SAMPLES["open_offered"].offered


def test_publishing_needs_a_settlement() -> None:
    """Without a signature the network can have no settlement: the channel still asks for the signature."""
    channel = SAMPLES["closing_expiry"]

    outcome = apply(channel, Published(), VIEW)

    assert isinstance(outcome, Accepted)
    assert next_step(outcome.channel) is Step.SIGN


@looped("name", sorted(SAMPLES))
@looped("kind", [Pay, CloseByProof, CloseByPayment])
def test_fault_75_a_forged_payment_learns_no_number(name: str, kind: type[Pay | CloseByProof | CloseByPayment]) -> None:
    """In every state a refusal of a forged payment names no number of the channel, for any change value."""
    channel = SAMPLES[name]
    held = {channel.payment.change_sat, channel.offered.change_sat if channel.offered else channel.payment.change_sat}
    for change in {1_000, *held, *(each + 1 for each in held), channel.funding_sat, channel.funding_sat + 1}:
        forged = Payment(Sat(change), Payer("stranger").payment(5_000).signature, 0x83)
        outcome = apply(channel, kind(forged), VIEW)
        if isinstance(outcome, Rejected) and not isinstance(outcome.error, ChannelMoved):  # that is in the chain
            numbers = {value for value in outcome.error.fields.values() if isinstance(value, int)}
            assert not (numbers & held) - {change}, outcome.error


def test_fault_76_an_automatic_withdrawal_needs_a_second_payment() -> None:
    """`settlement.withdraw_above_sat` waits for a payment after the opening one; a repetition is none."""
    payer = Payer("movable", movable=True)
    opened = payer.channel(500_000)
    again = step(opened, Pay(opened.payment))

    assert [can_withdraw(each) for each in (opened, again, payer.pay(opened, 1))] == [False, False, True]
    assert not can_withdraw(Payer("fixed").pay(Payer("fixed").channel(500_000), 1))
