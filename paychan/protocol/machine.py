"""The channel machine: every rule of a channel's life, as pure transitions over an immutable record.

Theory of operation. A `Channel` is what the store keeps. `apply(channel, command, view)` looks the command up in
`TRANSITIONS[state]` and returns `Accepted(channel, value)` or `Rejected(error)`; a refusal changes nothing. What must
be done next with the world (ask the application, the signer, the chain) is not kept anywhere: `channel.next_step`
derives it from the record, so the same code goes on after a crash at any point.

    OPEN ──drained, client, expiry, operator──▶ CLOSING ──signed, stored, published──▶ PUBLISHED ──deep──▶ CLOSED
                                                   ▲                                      │                   │
                                                   └──────── no longer in the chain ──────┴───────────────────┘
    any but LOST ──funding spent by something else──▶ LOST

Persisting is the caller's: persist, then adopt, then answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from paychan.protocol.channel import (
    Accepted,
    Answer,
    Channel,
    Close,
    CloseByPayment,
    CloseByProof,
    CloseReason,
    Closing,
    Command,
    Confirmed,
    Opening,
    Outcome,
    Pay,
    Published,
    Rejected,
    Rules,
    Signed,
    SpentElsewhere,
    State,
    Vanished,
    View,
)
from paychan.protocol.errors import (
    ApplicationRefused,
    ChainUnavailable,
    ChannelClosed,
    ChannelClosing,
    ChannelExpiring,
    ChannelLost,
    ExpiryTooSoon,
    FundingUnconfirmed,
    NotEconomical,
    NotNewestPayment,
    PaychanError,
    PaymentPending,
    PaymentShort,
    ValueBackwards,
)
from paychan.protocol.payment import Payment, PaymentVerifier, change_problem
from paychan.protocol.settlement import Shortfall, plan_fee
from paychan.protocol.types import Sat, UnixTime

Transition: TypeAlias = Callable[[Channel, Any, View, PaymentVerifier | None], Outcome]

_replace = msgspec.structs.replace

# --- opening --------------------------------------------------------------------------------------------------------


def min_expiry(view: View) -> UnixTime:
    """Expiries must be later than this: room for payments and for settling (PROTOCOL §7.2, the v2 rule)."""
    return UnixTime(view.now + view.rules.settlement_period_seconds + view.rules.min_duration_seconds)


def open_channel(opening: Opening, view: View, verifier: PaymentVerifier | None = None) -> Outcome:
    """Judge a new channel in the order of PROTOCOL §5.2; a payment that gives everything opens it closing."""
    rules, payment = view.rules, opening.payment
    if view.frozen:
        return Rejected(ChainUnavailable(reason=view.frozen))
    if opening.terms.expiry <= min_expiry(view):
        return Rejected(ExpiryTooSoon(got_unix=opening.terms.expiry, need_unix=min_expiry(view)))
    need = rules.confirmations_needed(opening.funding_sat)
    if opening.confirmations < need:
        return Rejected(FundingUnconfirmed(got=opening.confirmations, need=need))
    if payment.change_sat > opening.funding_sat:
        return Rejected(ValueBackwards(got_sat=payment.change_sat, need_sat=opening.funding_sat))
    problem = change_problem(payment, rules.dust_sat)
    if problem is None:
        verifier = verifier or PaymentVerifier(opening.terms, opening.outpoint, opening.change_script)
        problem = verifier.problem(payment)
    value = Sat(opening.funding_sat - payment.change_sat)
    if problem is None and value < opening.price_sat:
        problem = PaymentShort(got_sat=value, need_sat=opening.price_sat)
    if problem is not None:
        return Rejected(problem)
    channel = Channel(
        terms=opening.terms,
        outpoint=opening.outpoint,
        funding_sat=opening.funding_sat,
        change_script=opening.change_script,
        payment=payment,
        state=State.OPEN,
        seq=1,
        opened_at=view.now,
        secret=opening.secret,
    )
    if payment.change_sat == 0:
        shortfall = _shortfall(channel, view, CloseReason.DRAINED)
        return shortfall or Accepted(_closing(channel, CloseReason.DRAINED, view), value)
    return Accepted(channel, value)


# --- transitions ----------------------------------------------------------------------------------------------------


def apply(channel: Channel, command: Command, view: View, verifier: PaymentVerifier | None = None) -> Outcome:
    """Judge a command. `verifier` is the channel's, if the caller keeps one; it saves parsing the key again."""
    outcome = TRANSITIONS[channel.state][type(command)](channel, command, view, verifier)
    if isinstance(outcome, Accepted) and outcome.channel is not channel:
        return _replace(outcome, channel=_replace(outcome.channel, seq=channel.seq + 1))
    return outcome


def _pay(channel: Channel, command: Pay, view: View, verifier: PaymentVerifier | None) -> Outcome:
    """PROTOCOL §7.1, in its order; equal change is a repetition or a payment of nothing, and is accepted."""
    payment, newest = command.payment, channel.payment
    if view.frozen:
        return Rejected(ChainUnavailable(reason=view.frozen))
    if channel.offered is not None:
        return Rejected(PaymentPending(change_sat=channel.offered.change_sat))
    limit = channel.terms.expiry - view.rules.settlement_period_seconds
    if view.now >= limit:
        return Rejected(ChannelExpiring(now_unix=view.now, limit_unix=limit))
    if payment == newest:
        return Accepted(channel)
    problem = change_problem(payment, view.rules.dust_sat)
    if problem is None and payment.change_sat > newest.change_sat:
        problem = ValueBackwards(got_sat=payment.change_sat, need_sat=newest.change_sat)
    if problem is None:
        verifier = verifier or PaymentVerifier(channel.terms, channel.outpoint, channel.change_script)
        problem = verifier.problem(payment)
    if problem is not None:
        return Rejected(problem)
    outcome = _book(channel, payment, view)
    if view.rules.asks_application and isinstance(outcome, Accepted) and outcome.value_sat:
        offered = _replace(channel, offered=payment, offered_data=command.application_data)
        return Accepted(offered, outcome.value_sat)
    return outcome


def _book(channel: Channel, payment: Payment, view: View) -> Outcome:
    """Make a verified payment the newest; one that leaves nothing closes the channel."""
    value = Sat(channel.payment.change_sat - payment.change_sat)
    booked = _replace(channel, payment=payment, payments=channel.payments + 1, offered=None, offered_data="")
    if payment.change_sat == 0:
        shortfall = _shortfall(booked, view, CloseReason.DRAINED)
        return shortfall or Accepted(_closing(booked, CloseReason.DRAINED, view), value)
    return Accepted(booked, value)


def _answer(channel: Channel, command: Answer, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Book the offered payment, or forget it: the channel is then where it was."""
    if channel.offered is None:
        return Rejected(ApplicationRefused(reason="nothing was offered"))
    if command.refusal:
        return Accepted(_replace(channel, offered=None, offered_data=""))
    outcome = _book(channel, channel.offered, view)
    if isinstance(outcome, Rejected):  # the operator raised the dust limit meanwhile: don't ask for ever
        return Accepted(_replace(channel, offered=None, offered_data=""))
    return _replace(outcome, application_data=command.data)


def _close_by_proof(channel: Channel, command: CloseByProof, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """The newest payment, shown again, proves that the client asks (PROTOCOL §5.4)."""
    if channel.offered is not None:
        return Rejected(PaymentPending(change_sat=channel.offered.change_sat))
    if command.payment != channel.payment:
        return _not_newest(channel, command.payment)
    return _close(channel, CloseReason.CLIENT, view)


def _repeat_proof(channel: Channel, command: CloseByProof, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """A settled channel gives the same answer again."""
    return Accepted(channel) if command.payment == channel.payment else _not_newest(channel, command.payment)


def _close_by_payment(
    channel: Channel, command: CloseByPayment, view: View, verifier: PaymentVerifier | None
) -> Outcome:
    """Take the closing payment with the change address it was signed for; its value is the fee offered (§6.4)."""
    if channel.offered is not None:
        return Rejected(PaymentPending(change_sat=channel.offered.change_sat))
    payment, script = command.payment, command.change_script or channel.change_script
    problem = change_problem(payment, view.rules.dust_sat)
    if problem is None and payment.change_sat > channel.payment.change_sat:
        problem = ValueBackwards(got_sat=payment.change_sat, need_sat=channel.payment.change_sat)
    if problem is None:
        if verifier is None or script != channel.change_script:
            verifier = PaymentVerifier(channel.terms, channel.outpoint, script)
        problem = verifier.problem(payment)
    if problem is not None:
        return Rejected(problem)
    offered_fee = Sat(channel.payment.change_sat - payment.change_sat)
    final = _replace(channel, payment=payment, change_script=script)
    return _close(final, CloseReason.CLIENT, view, offered_fee)


def _close_by_us(channel: Channel, command: Close, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    return _close(channel, command.reason, view)


def _close(channel: Channel, reason: CloseReason, view: View, client_fee_sat: Sat = Sat(0)) -> Outcome:
    """Leave OPEN, unless the settlement would not be relayed or would burn all that was received.

    We may close before the application has answered; its payment is dropped, as the client was not told that it counts.
    """
    settled = _replace(channel, offered=None, offered_data="")
    return _shortfall(settled, view, reason, client_fee_sat) or Accepted(
        _closing(settled, reason, view, client_fee_sat)
    )


def _signed(channel: Channel, command: Signed, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    if channel.closing is None or channel.closing.settlement is not None:
        return Accepted(channel)  # the first one signed is the one that counts
    return Accepted(_replace(channel, closing=_replace(channel.closing, settlement=command.settlement)))


def _published(channel: Channel, command: Published, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    if channel.closing is None or channel.closing.settlement is None:
        return Accepted(channel)  # nothing was signed, so nothing of ours can be out there
    return Accepted(_replace(channel, state=State.PUBLISHED))


def _confirmed(channel: Channel, command: Confirmed, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    return Accepted(_replace(channel, state=State.CLOSED))


def _vanished(channel: Channel, command: Vanished, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Back to CLOSING; the stored settlement is published again."""
    return Accepted(_replace(channel, state=State.CLOSING))


def _lost(channel: Channel, command: SpentElsewhere, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    closing = channel.closing or Closing(CloseReason.EXPIRY, view.now)
    return Accepted(
        _replace(
            channel, state=State.LOST, offered=None, offered_data="", closing=_replace(closing, spent_by=command.txid)
        )
    )


def _unchanged(channel: Channel, command: Command, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """What was asked for has happened already."""
    return Accepted(channel)


def _ended(channel: Channel, command: Command, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Say how a channel that takes nothing more stands."""
    return Rejected(end_of(channel))


def end_of(channel: Channel) -> PaychanError:
    """The refusal that a channel outside OPEN answers with."""
    closing = channel.closing
    if channel.state is State.LOST and closing is not None:
        return ChannelLost(txid=closing.spent_by[::-1].hex())
    if channel.state in (State.PUBLISHED, State.CLOSED) and closing is not None and closing.settlement is not None:
        return ChannelClosed(txid=closing.settlement.txid[::-1].hex())
    return ChannelClosing()


def _not_newest(channel: Channel, payment: Payment) -> Rejected:
    return Rejected(NotNewestPayment(got_sat=payment.change_sat, need_sat=channel.payment.change_sat))


def _shortfall(channel: Channel, view: View, reason: CloseReason, client_fee_sat: Sat = Sat(0)) -> Rejected | None:
    """Refuse a closing whose settlement can't pay for itself. The largest destination script stands for any."""
    plan = plan_closing(channel, _LARGEST_DESTINATION, view.rules, reason, client_fee_sat)
    if isinstance(plan, Shortfall):
        return Rejected(NotEconomical(got_sat=plan.received_sat, need_sat=plan.needed_sat))
    return None


def plan_closing(
    channel: Channel, destination_script: bytes, rules: Rules, reason: CloseReason, client_fee_sat: Sat
) -> Sat | Shortfall:
    """Fee of a channel's settlement; only a client that asked for it may have all that we received burnt as fee."""
    return plan_fee(
        [channel.claim],
        destination_script,
        rules.fee_sat_per_vb,
        rules.dust_sat,
        client_fee_sat=client_fee_sat,
        may_give_all=reason is CloseReason.CLIENT,
    )


_LARGEST_DESTINATION = bytes(34)
"""P2WSH and P2TR outputs have the longest standard scriptPubKey."""


def _closing(channel: Channel, reason: CloseReason, view: View, client_fee_sat: Sat = Sat(0)) -> Channel:
    return _replace(channel, state=State.CLOSING, closing=Closing(reason, view.now, client_fee_sat))


TRANSITIONS: dict[State, dict[type[Struct], Transition]] = {
    State.OPEN: {
        Pay: _pay,
        Answer: _answer,
        CloseByProof: _close_by_proof,
        CloseByPayment: _close_by_payment,
        Close: _close_by_us,
        Signed: _unchanged,
        Published: _unchanged,
        Confirmed: _unchanged,
        Vanished: _unchanged,
        SpentElsewhere: _lost,
    },
    State.CLOSING: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _ended,
        CloseByPayment: _ended,
        Close: _unchanged,
        Signed: _signed,
        Published: _published,
        Confirmed: _unchanged,
        Vanished: _unchanged,
        SpentElsewhere: _lost,
    },
    State.PUBLISHED: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _repeat_proof,
        CloseByPayment: _unchanged,
        Close: _unchanged,
        Signed: _unchanged,
        Published: _unchanged,
        Confirmed: _confirmed,
        Vanished: _vanished,
        SpentElsewhere: _lost,
    },
    State.CLOSED: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _repeat_proof,
        CloseByPayment: _unchanged,
        Close: _unchanged,
        Signed: _unchanged,
        Published: _unchanged,
        Confirmed: _unchanged,
        Vanished: _vanished,
        SpentElsewhere: _lost,
    },
    State.LOST: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _ended,
        CloseByPayment: _ended,
        Close: _ended,
        Signed: _unchanged,
        Published: _unchanged,
        Confirmed: _unchanged,
        Vanished: _unchanged,
        SpentElsewhere: _unchanged,
    },
}
