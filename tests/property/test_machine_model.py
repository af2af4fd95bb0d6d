"""A channel's whole life against a model of plain integers: random commands, and the model predicts every outcome.

The model implements the rules of RBPCP §6.4, §7.1 and §8.1 separately; it shares no code with the core.
"""

from __future__ import annotations

import msgspec
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from paychan.protocol.channel import (
    Accepted,
    Answer,
    Channel,
    Close,
    CloseByPayment,
    CloseByProof,
    CloseReason,
    Command,
    Confirmed,
    Funded,
    Outcome,
    Pay,
    Published,
    Rejected,
    Rules,
    Signed,
    SpentElsewhere,
    State,
    Unanswered,
    Unfunded,
    Vanished,
    View,
)
from paychan.protocol.fees import most_offered_sat
from paychan.protocol.opening import open_channel, successor
from paychan.protocol.payment import Payment
from paychan.protocol.record import decode_record, encode_record
from paychan.protocol.settlement import Settlement
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.withdrawing import can_withdraw
from tests.lib.channels import NOW, RULES, VIEW, Payer, accepted, step
from tests.lib.ecdsa import sign_with_nonce

DUST = 546
PERIOD = 86_400
LARGEST_DESTINATION = 34  # bytes of the largest standard destination script


class Life(RuleBasedStateMachine):
    """One channel, driven by rules; `change`, `offered`, `state`, `payments`, `seq` and `signed` are the model."""

    channel: Channel

    # --- opening ----------------------------------------------------------------------------------------------------

    @initialize(
        movable=st.booleans(),
        funding=st.sampled_from([800, 2_000, 3_000, 1_000_000]),
        paid=st.sampled_from([0, 1, 100, 250, 900, 1_000, 1_400]),
        expiry=st.sampled_from([NOW + 30 * PERIOD, 2**31 - 1, 2**31, 2**32 - 1]),
    )
    def open(self, movable: bool, funding: int, paid: int, expiry: int) -> None:
        assume(funding - paid >= DUST)
        self.payer = Payer("model", UnixTime(expiry), Sat(funding), movable)
        self.channel = accepted(open_channel(self.payer.opening(paid), VIEW))
        self.funding, self.change, self.offered = funding, funding - paid, 0
        self.has_offer = self.signed = self.moves = self.moved = False
        self.state, self.payments, self.seq, self.income = State.OPEN, 0, 1, paid
        self.is_new, self.opening = True, self.channel.payment
        self.withdrawn, self.first_funding = 0, funding

    # --- the model's own arithmetic ---------------------------------------------------------------------------------

    def size(self, payment: Payment, *, change: bool, server: bool) -> int:
        """Bytes of the settlement, counted separately: the longest server signature, the largest destination."""
        script_sig = (
            1
            + len(payment.signature)
            + 1
            + 1
            + 72
            + 1
            + 2
            + (80 if self.channel.terms.expiry.lock_time < 2**31 else 81)
        )
        outputs = (8 + 1 + len(self.payer.change_script) if change else 0) + (
            8 + 1 + LARGEST_DESTINATION if server else 0
        )
        return 4 + 1 + 36 + 1 + script_sig + 4 + 1 + outputs + 4

    def settles(self, payment: Payment, *, asked: bool) -> bool:
        """Say whether the received value pays for a settlement that nodes relay."""
        received, change = self.funding - payment.change_sat, payment.change_sat > 0
        if received >= self.size(payment, change=change, server=True) + DUST:
            return True
        return asked and change and received >= self.size(payment, change=True, server=False)

    def ended(self) -> str:
        """The code with which a channel outside OPEN answers."""
        if self.moves and self.state not in {State.LOST, State.UNFUNDED}:
            return "channel_moved" if self.moved else "channel_moving"
        return {
            State.CLOSING: "channel_closing",
            State.PUBLISHED: "channel_closed",
            State.CLOSED: "channel_closed",
            State.LOST: "channel_lost",
            State.UNFUNDED: "never_funded",
        }[self.state]

    # --- judging ----------------------------------------------------------------------------------------------------

    def give(self, command: Command, *, asks: bool = False, frozen: bool = False, late: bool = False) -> Outcome:
        rules = Rules(Sat(DUST), 1, PERIOD, 3_600, 10, asks_application=asks)
        now = self.channel.terms.expiry.lock_time - PERIOD if late else NOW
        return apply(self.channel, command, View(UnixTime(now), rules, "stale" if frozen else ""))

    def expect(self, outcome: Outcome, code: str | None, *, changes: bool = True) -> None:
        """Compare with the predicted refusal, or keep the new record."""
        got = outcome.error.code if isinstance(outcome, Rejected) else None
        assert got == code, f"got {outcome}, model says {code}"
        if isinstance(outcome, Accepted):
            assert (outcome.channel is not self.channel) == changes
            self.channel = outcome.channel
            self.seq += changes

    def sign(self, change: int, nonce: int) -> Payment:
        """A payment signed by RFC 6979, or with another nonce: equally valid, but with other bytes."""
        payment = self.payer.payment(change)
        if not nonce:
            return payment
        payer = self.payer
        digest = payer.terms.kind.payment_digest(
            payer.terms, payer.outpoint, payer.funding_sat, payer.change_script, Sat(change)
        )
        return Payment(Sat(change), sign_with_nonce(self.payer.key, digest, nonce), payment.flag)

    changes_of_value = st.sampled_from([-1000, -1, 0, 1, 2, 100, 450, 1_200, "drain", "drain", "dust", "dust - 1"])

    def target(self, less: int | str) -> int:
        """The change value after a drawn step."""
        if less == "drain":
            return 0
        if isinstance(less, str):
            return DUST if less == "dust" else DUST - 1
        return self.change - less

    # --- commands ---------------------------------------------------------------------------------------------------

    @rule(
        less=changes_of_value,
        nonce=st.sampled_from([0, 0, 7]),
        mode=st.sampled_from(["", "", "", "asks", "frozen", "late"]),
    )
    def pay(self, less: int | str, nonce: int, mode: str) -> None:
        new = self.target(less)
        assume(new >= 0)
        payment = self.sign(new, nonce)
        outcome = self.give(Pay(payment, "order"), asks=mode == "asks", frozen=mode == "frozen", late=mode == "late")
        if self.state is not State.OPEN:
            self.expect(outcome, self.ended())
        elif mode == "frozen":
            self.expect(outcome, "chain_unavailable")
        elif self.has_offer:
            self.expect(outcome, "payment_pending")
        elif mode == "late":
            self.expect(outcome, "channel_expiring")
        elif payment == self.channel.payment:
            self.expect(outcome, None, changes=False)
        elif 0 < new < DUST:
            self.expect(outcome, "dust_change")
        elif new > self.change:
            self.expect(outcome, "value_backwards")
        elif new == 0 and not self.settles(payment, asked=False):
            self.expect(outcome, "not_economical")
        elif mode == "asks" and new < self.change:
            self.expect(outcome, None)
            self.offered, self.has_offer = new, True
        else:
            self.expect(outcome, None)
            self.book(outcome, new)

    def book(self, outcome: Outcome, new: int) -> None:
        """Check that a payment is booked."""
        assert isinstance(outcome, Accepted)
        assert outcome.value_sat == self.change - new
        self.income += outcome.value_sat
        self.is_new = self.channel.payment == self.opening  # also when its signature is shown again
        self.change, self.payments, self.has_offer = new, self.payments + 1, False
        if not new:
            self.state = State.CLOSING

    @rule(refusal=st.sampled_from(["", "sold out"]))
    def answer(self, refusal: str) -> None:
        outcome = self.give(Answer(refusal, "data"))
        if self.state in {State.CLOSING, State.UNFUNDED} and self.has_offer:
            self.expect(outcome, None)
            self.decide(outcome, counts=not refusal)
        elif self.state is not State.OPEN:
            self.expect(outcome, self.ended())
        elif not self.has_offer:
            self.expect(outcome, "application_error")
        elif refusal:
            self.expect(outcome, None)
            self.has_offer = False
        else:
            self.expect(outcome, None)
            self.book(outcome, self.offered)

    def decide(self, outcome: Outcome, *, counts: bool) -> None:
        """Check that the offered payment of a closing channel is booked, or dropped."""
        assert isinstance(outcome, Accepted)
        assert outcome.value_sat == (self.change - self.offered if counts else 0)
        if counts:
            self.income += outcome.value_sat
            self.change, self.payments = self.offered, self.payments + 1
        self.has_offer = False

    @rule(asks=st.booleans(), late=st.booleans())
    def no_answer(self, asks: bool, late: bool) -> None:
        """A closing channel decides itself after half of the time, or if no application is configured any more."""
        outcome = self.give(Unanswered(), asks=asks, late=late)
        decides = self.state is State.CLOSING and self.has_offer and (not asks or self.is_urgent(late))
        self.expect(outcome, None, changes=decides)
        if decides:
            self.decide(outcome, counts=True)

    def is_urgent(self, late: bool) -> bool:
        assert self.channel.closing is not None
        expiry, begun = self.channel.terms.expiry.lock_time, self.channel.closing.begun_at
        now = expiry - PERIOD if late else NOW
        return 2 * (now - begun) >= expiry - begun

    @rule(damage=st.sampled_from(["flag", "signature", "other change"]), less=st.sampled_from([0, 1, 100]))
    def pay_with_a_wrong_signature(self, damage: str, less: int) -> None:
        assume(self.state is State.OPEN and not self.has_offer and self.change - less - 1 >= DUST)
        good = self.payer.payment(self.change - less - 1)
        bad = {
            "flag": Payment(good.change_sat, good.signature, 0x03),
            "signature": Payment(good.change_sat, self.payer.payment(self.funding + 1).signature, good.flag),
            "other change": Payment(Sat(good.change_sat + 1), good.signature, good.flag),
        }[damage]
        self.expect(self.give(Pay(bad)), "bad_flag" if damage == "flag" else "bad_signature")

    @rule(newest=st.booleans())
    def close_by_proof(self, newest: bool) -> None:
        payment = self.channel.payment if newest else self.sign(self.channel.payment.change_sat, 11)
        outcome = self.give(CloseByProof(payment))
        if self.state in {State.CLOSING, State.LOST, State.UNFUNDED}:
            self.expect(outcome, self.ended())
        elif not newest:
            self.expect(outcome, "not_newest_payment")
        elif self.state is not State.OPEN:
            self.expect(outcome, None, changes=False)
        else:
            self.close(outcome, payment, asked=True)

    @rule(less=changes_of_value, nonce=st.sampled_from([0, 13]))
    def close_by_payment(self, less: int | str, nonce: int) -> None:
        new = self.target(less)
        assume(new >= 0)
        payment = self.sign(new, nonce)
        outcome = self.give(CloseByPayment(payment))
        if self.state in {State.CLOSING, State.LOST, State.UNFUNDED} or self.moves:
            self.expect(outcome, self.ended())
        elif self.state is not State.OPEN:
            self.expect(outcome, None, changes=False)
        elif 0 < new < DUST:
            self.expect(outcome, "dust_change")
        elif new > self.change:
            self.expect(outcome, "value_backwards")
        else:
            pays_offer = self.has_offer and new <= self.offered
            fee = (self.offered if pays_offer else self.change) - new
            if isinstance(outcome, Rejected) and outcome.error.code == "closing_fee_too_high":
                before = self.channel.funding_sat - new - fee
                most = most_offered_sat(self.channel.claim, Sat(before), RULES)
                assert fee > most - 3 * RULES.max_fee_sat_per_vb  # signatures differ by some bytes
                return
            self.close(outcome, payment, asked=True)
            if isinstance(outcome, Accepted):
                assert self.channel.closing is not None
                assert self.channel.closing.client_fee_sat == fee
                self.change, self.income = new, self.income + self.change - new
                self.payments += pays_offer

    @rule(reason=st.sampled_from([CloseReason.EXPIRY, CloseReason.OPERATOR]), frozen=st.booleans(), late=st.booleans())
    def close_by_us(self, reason: CloseReason, frozen: bool, late: bool) -> None:
        outcome = self.give(Close(reason), frozen=frozen, late=late)
        if self.state is State.OPEN:
            self.close(outcome, self.channel.offered or self.channel.payment, asked=False)
        elif self.state in {State.LOST, State.UNFUNDED} or self.moves:
            self.expect(outcome, self.ended())
        else:
            self.expect(outcome, None, changes=False)

    @rule(late=st.booleans())
    def withdraw(self, late: bool) -> None:
        """A withdrawal needs a channel whose change funds it again, and a payment other than the opening one."""
        outcome = self.give(Close(CloseReason.WITHDRAW), late=late)
        if self.state is not State.OPEN:
            ended = self.state in {State.LOST, State.UNFUNDED}
            self.expect(outcome, self.ended() if ended else None, changes=False)
        elif not self.payer.movable or self.is_new:
            self.expect(outcome, "not_withdrawable")
        elif self.has_offer:
            self.expect(outcome, "payment_pending")
        elif late:
            self.expect(outcome, "channel_expiring")
        else:
            self.close(outcome, self.channel.payment, asked=False)
            self.moves = self.state is State.CLOSING

    @precondition(lambda self: self.moved and self.state is State.CLOSED)
    @rule()
    def go_on_elsewhere(self) -> None:
        """The successor holds the change, has received nothing, and accepts payments signed for its own output."""
        assert self.channel.closing is not None
        self.channel = successor(self.channel, NOW)
        at = self.channel.outpoint
        self.withdrawn += self.income
        self.funding, self.income = self.change, 0
        self.payer = msgspec.structs.replace(self.payer, funding_sat=Sat(self.funding), at=at)
        self.state, self.seq, self.signed, self.moves, self.moved = State.OPEN, 1, False, False, False
        self.is_new, self.payments = False, 0

    def close(self, outcome: Outcome, payment: Payment, *, asked: bool) -> None:
        """A channel closes if its settlement is economical; a client's close drops the offer, the server's keeps it."""
        if not self.settles(payment, asked=asked):
            self.expect(outcome, "not_economical")
            return
        self.expect(outcome, None)
        self.state, self.has_offer = State.CLOSING, self.has_offer and not asked

    @precondition(lambda self: self.state is not State.OPEN)
    @rule()
    def go_on(self) -> None:
        """The next step of the settlement succeeds."""
        if self.state is State.CLOSING and self.has_offer:
            self.answer("")
        elif self.state is State.CLOSING and not self.signed:
            self.sign_settlement()
        else:
            mined = Confirmed(self.newest().txid if self.signed else b"\x45" * 32)
            self.watch(Published() if self.state is State.CLOSING else mined)

    def newest(self) -> Settlement:
        assert self.channel.closing is not None
        assert self.channel.closing.settlement is not None
        return self.channel.closing.settlement

    @rule(command=st.sampled_from([Published(), Confirmed(b"\x44" * 32), Vanished(), Vanished()]))
    def watch(self, command: Command) -> None:
        """Reports of the chain in any state: those that do not fit change nothing."""
        after: dict[tuple[State, type], State] = {
            (State.CLOSING, Published): State.PUBLISHED if self.signed else State.CLOSING,
            (State.PUBLISHED, Confirmed): State.CLOSED,
            (State.PUBLISHED, Vanished): State.CLOSING,
            (State.CLOSED, Vanished): State.CLOSING,
            (State.LOST, Vanished): State.CLOSING,
        }
        state = after.get((self.state, type(command)), self.state)
        self.expect(self.give(command), None, changes=state is not self.state)
        self.moved = self.state is not State.LOST and (self.moved or (self.moves and state is State.CLOSED))
        if state is State.CLOSED and isinstance(command, Confirmed) and self.state is State.PUBLISHED:
            assert self.channel.closing is not None
            assert (self.channel.closing.spent_by or self.newest().txid) == command.txid
        self.state = state

    @precondition(lambda self: self.state is not State.OPEN)
    @rule()
    def sign_settlement(self) -> None:
        """A closing channel stores the signer's first settlement, which can always be planned."""
        counts = self.state is State.CLOSING and not self.signed and not self.has_offer
        closing = self.channel.closing
        asked = closing is not None and closing.reason is CloseReason.CLIENT
        assume(not counts or self.settles(self.channel.payment, asked=asked))  # not after a refund vanished
        spent = CTxIn(COutPoint(self.channel.outpoint.txid, self.channel.outpoint.vout))
        cheap = CTransaction([spent], [CTxOut(1, CScript(bytes(900)))]).serialize()
        settlement = self.payer.settlement(self.channel) if counts else Settlement(cheap, b"\x33" * 32, Sat(1))
        self.expect(self.give(Signed(settlement)), None, changes=counts)
        self.signed = self.signed or counts

    @precondition(lambda self: self.signed)
    @rule(percent=st.sampled_from([-10, 0, 1, 25, 300]))
    def sign_again(self, percent: int) -> None:
        """A settlement at a higher rate replaces the last one until a block contains one of them."""
        paid = self.newest()
        fee = paid.fee_sat + (paid.fee_sat * percent + 99) // 100
        counts = fee > paid.fee_sat and self.state in {State.CLOSING, State.PUBLISHED}
        again = Settlement(paid.transaction, bytes([percent % 256]) * 32, Sat(fee))
        self.expect(self.give(Signed(again)), None, changes=counts)
        if counts:
            self.state = State.CLOSING
            assert self.newest() == again

    @precondition(lambda self: self.seq > 3)
    @rule()
    def spent_elsewhere(self) -> None:
        moves = self.state is not State.LOST
        self.expect(self.give(SpentElsewhere(b"\x22" * 32)), None, changes=moves)
        self.state, self.has_offer = State.LOST, False

    @precondition(lambda self: self.seq > 3)
    @rule(command=st.sampled_from([Unfunded(), Funded(), Funded()]))
    def fund(self, command: Command) -> None:
        """Replaced funding makes the channel UNFUNDED; funding that returns restores its state, and its offer."""
        state = self.state
        if isinstance(command, Unfunded) and state in {State.OPEN, State.CLOSING, State.PUBLISHED}:
            state = State.UNFUNDED
        if isinstance(command, Funded) and state is State.UNFUNDED:
            state = State.OPEN if self.channel.closing is None else State.CLOSING
        self.expect(self.give(command), None, changes=state is not self.state)
        self.state = state

    # --- invariants -------------------------------------------------------------------------------------------------

    @invariant()
    def record_and_model_agree(self) -> None:
        channel = self.channel
        assert (channel.state, channel.seq, channel.payments) == (self.state, self.seq, self.payments)
        assert channel.payment.change_sat == self.change
        assert (channel.offered.change_sat if channel.offered else None) == (self.offered if self.has_offer else None)
        assert channel.offered_data == ("order" if self.has_offer else "")
        assert channel.received_sat == self.funding - self.change == self.income
        assert self.withdrawn + self.income + self.change == self.first_funding
        assert decode_record(encode_record(channel)) == channel


def test_a_channel_lives_as_the_model_says() -> None:
    """For any commands in any order, amounts, states, counts and refusals equal those of the model."""
    run_state_machine_as_test(Life, settings=settings(max_examples=250, stateful_step_count=40))


def test_fault_76_the_opening_payment_shown_again_publishes_the_secret() -> None:
    """Another signature for the same change may be settled; after the opening payment is the newest again, it may not."""
    life = Life()
    life.payer = Payer("model", UnixTime(NOW + 30 * PERIOD), Sat(800), movable=True)
    channel = accepted(open_channel(life.payer.opening(0), VIEW))
    otherwise = step(channel, Pay(life.sign(800, 7)))
    again = step(otherwise, Pay(life.sign(800, 0)))

    assert can_withdraw(otherwise)
    assert again.payment == channel.payment
    assert not can_withdraw(again)
