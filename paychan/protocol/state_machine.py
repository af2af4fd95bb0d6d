"""The channel machine: every rule of a channel's life, as pure transitions over an immutable record.

Theory of operation. The store keeps a `Channel` as a record. `apply(channel, command, view)` looks the command up in
`TRANSITIONS[state]` and returns `Accepted(channel, value)` or `Rejected(error)`; a refusal changes nothing. The next
action outside the core (ask the application, the signer, the chain) is not stored anywhere: `channel.next_step` derives
it from the record, so the same code continues after a crash at any point.

    OPEN ──drained, client, expiry, operator──▶ CLOSING ──signed, stored, published──▶ PUBLISHED ──deep──▶ CLOSED
                                                   ▲                                      │                   │
                                                   ├────────── signed, higher fee ────────┤                   │
                                                   └──────── no longer in the chain ──────┴───────────────────┘
    any but LOST ──the client's refund is deep──▶ LOST ──the chain drops it──▶ CLOSING
    OPEN, CLOSING, PUBLISHED ──funding replaced──▶ UNFUNDED ──funding confirms──▶ the state before: OPEN or CLOSING
    any ──a settlement that the record lacks is in the chain──▶ PUBLISHED, or CLOSING to replace it
    OPEN, CLOSING, PUBLISHED ──the signer has signed a settlement that the record lacks──▶ CLOSING

`paying.py` has the three steps of a payment, `credit.py` the requests that payments pay for, `closing.py` the way out of OPEN, `offering.py` the rules for a payment that
waits for the application's answer. A withdrawal uses the same states;
`opening.successor` is the channel that continues at its change output. `opening.py` has the start of a channel,
`finding.py` the settlements that the chain shows and the record lacks.

The caller persists: it stores the new record, then uses it, then answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from paychan.protocol.adoption import adopted
from paychan.protocol.channel import (
    Accepted,
    Adopt,
    Answer,
    Channel,
    Close,
    CloseByPayment,
    CloseByProof,
    CloseReason,
    Closing,
    Command,
    Confirmed,
    Found,
    Funded,
    Kept,
    Outcome,
    Pay,
    Published,
    Rejected,
    Signed,
    SpentElsewhere,
    State,
    TakenBack,
    Unanswered,
    Unfunded,
    Vanished,
    View,
)
from paychan.protocol.charges import Charge, Delivered, Release
from paychan.protocol.closing import close
from paychan.protocol.credit import charge, mark_delivered, release
from paychan.protocol.ending import end_of
from paychan.protocol.errors import (
    ApplicationRefused,
    ClosingFeeTooHigh,
)
from paychan.protocol.fees import most_offered_sat
from paychan.protocol.finding import found
from paychan.protocol.forgery import not_below, not_newest
from paychan.protocol.offering import answered, decided_by_client, unanswered
from paychan.protocol.paying import book_payment, pay
from paychan.protocol.payment import PaymentVerifier
from paychan.protocol.settlement import leaves_out
from paychan.protocol.types import Sat
from paychan.protocol.withdrawing import taken_back, withdrawal_problem

Transition: TypeAlias = Callable[[Channel, Any, View, PaymentVerifier | None], Outcome]

_replace = msgspec.structs.replace

# --- transitions ----------------------------------------------------------------------------------------------------


def apply(channel: Channel, command: Command, view: View, verifier: PaymentVerifier | None = None) -> Outcome:
    """Judge a command. `verifier` is the channel's, if the caller keeps one; then the key is not parsed again."""
    outcome = TRANSITIONS[channel.state][type(command)](channel, command, view, verifier)
    if isinstance(outcome, Accepted) and outcome.channel is not channel and outcome.channel.seq == channel.seq:
        return Accepted(_replace(outcome.channel, seq=channel.seq + 1), outcome.value_sat, outcome.application_data)
    return outcome


def _pay(channel: Channel, command: Pay, view: View, verifier: PaymentVerifier | None) -> Outcome:
    return pay(channel, command, view, verifier or channel.verifier())


def _answer(channel: Channel, command: Answer, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Book the offered payment, or drop it: then the channel is as it was before the offer."""
    if channel.offered is None:
        return Rejected(ApplicationRefused(reason="nothing was offered"))
    if command.refusal:
        return Accepted(_replace(channel, offered=None, offered_data=""))
    outcome = book_payment(channel, channel.offered, view)
    if isinstance(outcome, Rejected):  # the operator raised the dust limit meanwhile: stop asking the application
        return Accepted(_replace(channel, offered=None, offered_data=""))
    return _replace(outcome, application_data=command.data)


def _answer_closing(channel: Channel, command: Answer, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Book or drop the payment that was offered before the channel left OPEN."""
    return Rejected(end_of(channel)) if channel.offered is None else answered(channel, command)


def _unanswered(channel: Channel, command: Unanswered, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    return Accepted(channel) if channel.offered is None else unanswered(channel, view)


def _close_by_proof(channel: Channel, command: CloseByProof, view: View, verifier: PaymentVerifier | None) -> Outcome:
    """Close for a caller that shows the newest payment: only the client has it (RBPCP §5.4)."""
    if command.payment not in (channel.payment, channel.offered):
        return Rejected(not_newest(channel, command, verifier))
    return close(decided_by_client(channel, command.payment), CloseReason.CLIENT, view)


def _repeat_proof(channel: Channel, command: CloseByProof, view: View, verifier: PaymentVerifier | None) -> Outcome:
    """Repeat the answer of a settled channel."""
    return Accepted(channel) if command.payment == channel.payment else Rejected(not_newest(channel, command, verifier))


def _close_by_payment(
    channel: Channel, command: CloseByPayment, view: View, verifier: PaymentVerifier | None
) -> Outcome:
    """Accept the closing payment with the change address that it signs; its value is the offered fee (RBPCP §6.4).

    An offer that can't become fee as a whole is refused, because the server must not keep the rest of it.
    """
    payment, script = command.payment, command.change_script or channel.change_script
    if verifier is None or script != channel.change_script:
        verifier = channel.verifier(script)
    problem = verifier.problem(payment, view.rules.dust_sat)
    if problem is None and payment.change_sat > channel.payment.change_sat:
        problem = not_below(channel, payment)
    if problem is not None:
        return Rejected(problem)
    channel = decided_by_client(channel, payment)
    offered_fee = Sat(channel.payment.change_sat - payment.change_sat)
    final = _replace(channel, payment=payment, change_script=script)
    most = most_offered_sat(final.claim, channel.received_sat, view.rules)
    if offered_fee > most:
        return Rejected(ClosingFeeTooHigh(got_sat=offered_fee, need_sat=most))
    return close(final, CloseReason.CLIENT, view, client_fee_sat=offered_fee)


def _close_by_server(channel: Channel, command: Close, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    problem = withdrawal_problem(channel, view) if command.reason is CloseReason.WITHDRAW else None
    return Rejected(problem) if problem is not None else close(channel, command.reason, view)


def _signed(channel: Channel, command: Signed, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Store the first settlement, and a later one only if it pays a higher rate or lacks inputs; then broadcast it.

    A settlement lacks inputs of the one before if that was a batch or spent a reserve coin, and an input of it is gone.
    While a payment is offered, no settlement is stored: the payment to settle is not decided yet.
    """
    if channel.closing is None or channel.offered is not None:
        return Accepted(channel)
    paid, new = channel.closing.settlement, command.settlement
    if paid is not None and not new.is_dearer_than(paid) and not leaves_out(new, paid):
        return Accepted(channel)
    closing = _replace(channel.closing, settlement=new)
    return Accepted(_replace(channel, state=State.CLOSING, closing=closing))


def _published(channel: Channel, command: Published, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    if channel.closing is None or channel.closing.settlement is None:
        return Accepted(channel)  # the signer has signed nothing, so the network can have no settlement
    return Accepted(_replace(channel, state=State.PUBLISHED))


def _kept(channel: Channel, command: Kept, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Record the settlement that the network has: a child spends its output, and the operator sees it."""
    if channel.closing is None:
        return Accepted(channel)
    closing = _replace(channel.closing, settlement=command.settlement)
    kept = _replace(channel, state=State.PUBLISHED, closing=closing, offered=None, offered_data="")
    return Accepted(channel if kept == channel else kept)


def _confirmed(channel: Channel, command: Confirmed, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Store the txid if it is not the newest settlement's: an earlier one was mined, or a peer changed its scripts."""
    closing = channel.closing
    if closing is None or closing.settlement is None:
        return Accepted(channel)
    named = channel.moves or command.txid != closing.settlement.txid
    closing = _replace(closing, spent_by=command.txid if named else b"")
    return Accepted(_replace(channel, state=State.CLOSED, closing=closing))


def _vanished(channel: Channel, command: Vanished, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Return to CLOSING: the stored settlement is broadcast again, or the first one is signed."""
    closing = channel.closing
    if channel.state is State.LOST and closing is not None:
        closing = _replace(closing, spent_by=b"")
    return Accepted(_replace(channel, state=State.CLOSING, closing=closing))


def _unfunded(channel: Channel, command: Unfunded, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Stop counting the channel. An offered payment stays, and counts again if the funding output comes back."""
    return Accepted(_replace(channel, state=State.UNFUNDED))


def _funded(channel: Channel, command: Funded, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Return to the state before UNFUNDED."""
    return Accepted(_replace(channel, state=State.OPEN if channel.closing is None else State.CLOSING))


def _adopt(channel: Channel, command: Adopt, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Take over the claim that the signer signed after the backup of this record; see `adoption`."""
    return adopted(channel, command, view)


def _lost(channel: Channel, command: SpentElsewhere, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    if channel.state is State.LOST and channel.closing and channel.closing.spent_by == command.txid:
        return Accepted(channel)
    closing = channel.closing or Closing(CloseReason.EXPIRY, view.paying_time)
    return Accepted(
        _replace(
            channel, state=State.LOST, offered=None, offered_data="", closing=_replace(closing, spent_by=command.txid)
        )
    )


def _close_again(channel: Channel, command: Close, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Accept a repeated close; refuse one for a channel that continues elsewhere, which the caller must close there."""
    moves_on = channel.moves and command.reason is not CloseReason.WITHDRAW
    return Rejected(end_of(channel)) if moves_on else Accepted(channel)


def _repeat_close(channel: Channel, command: Command, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Repeat the answer of a settled channel; refuse for one that continues elsewhere: the caller closes it there."""
    return Rejected(end_of(channel)) if channel.moves else Accepted(channel)


def _unchanged(channel: Channel, command: Command, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Accept a command that has no effect in this state."""
    return Accepted(channel)


def _ended(channel: Channel, command: Command, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Refuse with the state of a channel that accepts nothing more."""
    return Rejected(end_of(channel))


_WITHOUT_EFFECT: dict[type[Struct], Transition] = {
    Signed: _unchanged,
    Published: _unchanged,
    Kept: _unchanged,
    Confirmed: _unchanged,
    Vanished: _unchanged,
    SpentElsewhere: _lost,
    Adopt: _unchanged,
    TakenBack: _unchanged,
    Found: found,
    Unfunded: _unchanged,
    Funded: _unchanged,
    Unanswered: _unchanged,
    Release: release,
    Delivered: mark_delivered,
}
"""Commands that mean the same in every state, and reports of signer and chain in states in which they have no effect."""

_REFUSED: dict[type[Struct], Transition] = {
    Pay: _ended,
    Charge: _ended,
    Answer: _ended,
    CloseByProof: _ended,
    CloseByPayment: _ended,
    Close: _ended,
}

TRANSITIONS: dict[State, dict[type[Struct], Transition]] = {
    State.OPEN: {
        **_WITHOUT_EFFECT,
        Pay: _pay,
        Charge: charge,
        Answer: _answer,
        CloseByProof: _close_by_proof,
        CloseByPayment: _close_by_payment,
        Close: _close_by_server,
        Adopt: _adopt,
        Unfunded: _unfunded,
    },
    State.CLOSING: {
        **_WITHOUT_EFFECT,
        **_REFUSED,
        Close: _close_again,
        Answer: _answer_closing,
        Unanswered: _unanswered,
        Signed: _signed,
        Published: _published,
        Kept: _kept,
        Adopt: _adopt,
        TakenBack: taken_back,
        Unfunded: _unfunded,
    },
    State.PUBLISHED: {
        **_WITHOUT_EFFECT,
        **_REFUSED,
        CloseByProof: _repeat_proof,
        CloseByPayment: _repeat_close,
        Close: _close_again,
        Signed: _signed,
        Kept: _kept,
        Confirmed: _confirmed,
        Vanished: _vanished,
        Adopt: _adopt,
        Unfunded: _unfunded,
    },
    State.CLOSED: {
        **_WITHOUT_EFFECT,
        **_REFUSED,
        CloseByProof: _repeat_proof,
        CloseByPayment: _repeat_close,
        Close: _close_again,
        Vanished: _vanished,
    },
    State.LOST: {
        **_WITHOUT_EFFECT,
        **_REFUSED,
        Vanished: _vanished,
    },
    State.UNFUNDED: {
        **_WITHOUT_EFFECT,
        **_REFUSED,
        Answer: _answer_closing,
        Funded: _funded,
    },
}
