"""The channel machine: every rule of a channel's life, as pure transitions over an immutable record.

Theory of operation. A `Channel` is what the store keeps. `apply(channel, command, view)` looks the command up in
`TRANSITIONS[state]` and returns `Accepted(channel, value)` or `Rejected(error)`; a refusal changes nothing. What must
be done next with the world (ask the application, the signer, the chain) is not kept anywhere: `channel.next_step`
derives it from the record, so the same code goes on after a crash at any point.

    OPEN ──drained, client, expiry, operator──▶ CLOSING ──signed, stored, published──▶ PUBLISHED ──deep──▶ CLOSED
                                                   ▲                                      │                   │
                                                   ├──────────── signed, dearer ──────────┤                   │
                                                   └──────── no longer in the chain ──────┴───────────────────┘
    any but LOST ──funding spent by something else──▶ LOST
    any but CLOSED, LOST ──the signer has signed for it, and the record lacks that──▶ CLOSING

A withdrawal takes the same way; `opening.successor` is the channel that goes on at its change output. How a channel
begins is in `opening.py`.

Persisting is the caller's: persist, then adopt, then answer.
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
    Kept,
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
    ChannelMoved,
    ChannelMoving,
    NotEconomical,
    NotNewestPayment,
    NotWithdrawable,
    PaychanError,
    PaymentPending,
    ValueBackwards,
)
from paychan.protocol.fees import Shortfall, plan_closing
from paychan.protocol.payment import Payment, PaymentVerifier, change_problem
from paychan.protocol.rest import opening_secret
from paychan.protocol.settlement import leaves_out
from paychan.protocol.types import OutPoint, Sat

Transition: TypeAlias = Callable[[Channel, Any, View, PaymentVerifier | None], Outcome]

_replace = msgspec.structs.replace

# --- transitions ----------------------------------------------------------------------------------------------------


def apply(channel: Channel, command: Command, view: View, verifier: PaymentVerifier | None = None) -> Outcome:
    """Judge a command. `verifier` is the channel's, if the caller keeps one; it saves parsing the key again."""
    outcome = TRANSITIONS[channel.state][type(command)](channel, command, view, verifier)
    if isinstance(outcome, Accepted) and outcome.channel is not channel:
        return Accepted(_replace(outcome.channel, seq=channel.seq + 1), outcome.value_sat, outcome.application_data)
    return outcome


def _pay(channel: Channel, command: Pay, view: View, verifier: PaymentVerifier | None) -> Outcome:
    """PROTOCOL §7.1, the signature before the value; equal change is a repetition or a payment of nothing, and is accepted.

    In v1 an outpoint is all that a stranger needs to ask: what the channel holds is named only to a client that signs for it.
    """
    payment, newest = command.payment, channel.payment
    if view.frozen:
        return Rejected(ChainUnavailable(reason=view.frozen))
    if channel.offered is not None:
        return Rejected(forged(channel, command, verifier) or _pending(channel.offered))
    limit = channel.terms.expiry - view.rules.settlement_period_seconds
    if view.now >= limit:
        return Rejected(ChannelExpiring(now_unix=view.now, limit_unix=limit))
    if payment == newest:
        return Accepted(channel)
    problem = change_problem(payment, view.rules.dust_sat)
    if problem is None:
        verifier = verifier or PaymentVerifier(channel.terms, channel.outpoint, channel.change_script)
        problem = verifier.problem(payment)
    if problem is None and payment.change_sat > newest.change_sat:
        problem = ValueBackwards(got_sat=payment.change_sat, need_sat=newest.change_sat)
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
    return close(booked, CloseReason.DRAINED, view, value) if payment.change_sat == 0 else Accepted(booked, value)


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


def _close_by_proof(channel: Channel, command: CloseByProof, view: View, verifier: PaymentVerifier | None) -> Outcome:
    """The newest payment, shown again, proves that the client asks (PROTOCOL §5.4)."""
    if channel.offered is not None:
        return Rejected(forged(channel, command, verifier) or _pending(channel.offered))
    if command.payment != channel.payment:
        return _not_newest(channel, command, verifier)
    return close(channel, CloseReason.CLIENT, view)


def _repeat_proof(channel: Channel, command: CloseByProof, view: View, verifier: PaymentVerifier | None) -> Outcome:
    """A settled channel gives the same answer again."""
    return Accepted(channel) if command.payment == channel.payment else _not_newest(channel, command, verifier)


def _close_by_payment(
    channel: Channel, command: CloseByPayment, view: View, verifier: PaymentVerifier | None
) -> Outcome:
    """Take the closing payment with the change address it was signed for; its value is the fee offered (§6.4)."""
    if channel.offered is not None:
        return Rejected(forged(channel, command, verifier) or _pending(channel.offered))
    payment, script = command.payment, command.change_script or channel.change_script
    problem = change_problem(payment, view.rules.dust_sat)
    if problem is None:
        if verifier is None or script != channel.change_script:
            verifier = PaymentVerifier(channel.terms, channel.outpoint, script)
        problem = verifier.problem(payment)
    if problem is None and payment.change_sat > channel.payment.change_sat:
        problem = ValueBackwards(got_sat=payment.change_sat, need_sat=channel.payment.change_sat)
    if problem is not None:
        return Rejected(problem)
    offered_fee = Sat(channel.payment.change_sat - payment.change_sat)
    final = _replace(channel, payment=payment, change_script=script)
    return close(final, CloseReason.CLIENT, view, client_fee_sat=offered_fee)


def _close_by_us(channel: Channel, command: Close, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    problem = _withdrawal_problem(channel, view) if command.reason is CloseReason.WITHDRAW else None
    return Rejected(problem) if problem is not None else close(channel, command.reason, view)


def can_move(channel: Channel) -> bool:
    """Say whether a channel can go on at the change output of a withdrawal: a v2 channel whose change funds it again.

    PROTOCOL §6.2: "so that the server can move received value without the client".
    """
    return bool(channel.secret) and channel.change_script == channel.terms.funding_script


def publishes_secret(channel: Channel) -> bool:
    """Say whether settling now would publish the channel's secret: that is the hash of the opening payment's signature.

    Nothing is withdrawn then, as the channel would go on under a secret that anybody can read in the chain. One payment
    more of the client's, whatever its value, is settled instead. Deriving another secret for what goes on would not help:
    whoever has read the old one is told the new place like the client.
    """
    return opening_secret(channel.payment) == channel.secret


def can_withdraw(channel: Channel) -> bool:
    """Say whether what an open channel received can be withdrawn now."""
    return can_move(channel) and not publishes_secret(channel)


def _withdrawal_problem(channel: Channel, view: View) -> PaychanError | None:
    limit = channel.terms.expiry - view.rules.settlement_period_seconds
    if not can_move(channel):
        return NotWithdrawable(reason="its change does not go back to its funding address")
    if publishes_secret(channel):
        return NotWithdrawable(reason="it would publish the channel's secret, until the client has paid once more")
    if channel.offered is not None:
        return PaymentPending(change_sat=channel.offered.change_sat)
    return ChannelExpiring(now_unix=view.now, limit_unix=limit) if view.now >= limit else None


def close(
    channel: Channel, reason: CloseReason, view: View, value_sat: Sat = Sat(0), client_fee_sat: Sat = Sat(0)
) -> Outcome:
    """Leave OPEN, unless the settlement would not be relayed or would burn all that was received.

    We may close before the application has answered; its payment is dropped, as the client was not told that it counts.
    The largest destination script stands for any.
    """
    closing = _replace(
        channel,
        state=State.CLOSING,
        offered=None,
        offered_data="",
        closing=Closing(reason, view.paying_time, client_fee_sat),
    )
    plan = least_fee(closing, view.rules)
    if isinstance(plan, Shortfall):
        return Rejected(NotEconomical(got_sat=plan.received_sat, need_sat=plan.needed_sat))
    return Accepted(closing, value_sat)


def least_fee(channel: Channel, rules: Rules) -> Sat | Shortfall:
    """Fee of a channel's settlement at the lowest rate of the curve, or why it can't be settled."""
    return plan_closing([channel], _LARGEST_DESTINATION, rules)


_LARGEST_DESTINATION = bytes(34)
"""P2WSH and P2TR outputs have the longest standard scriptPubKey."""


def _signed(channel: Channel, command: Signed, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Adopt the first settlement, and a later one only if it pays a higher rate; it is to be published.

    Or one that spends less than the last: that was a batch, or had a coin of the reserve, and an input of it is gone.
    """
    if channel.closing is None:
        return Accepted(channel)
    paid = channel.closing.settlement
    new = command.settlement
    if paid is not None and not new.is_dearer_than(paid) and not leaves_out(new, paid):
        return Accepted(channel)
    closing = _replace(channel.closing, settlement=new)
    return Accepted(_replace(channel, state=State.CLOSING, closing=closing))


def _published(channel: Channel, command: Published, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    if channel.closing is None or channel.closing.settlement is None:
        return Accepted(channel)  # nothing was signed, so nothing of ours can be out there
    return Accepted(_replace(channel, state=State.PUBLISHED))


def _kept(channel: Channel, command: Kept, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Record what the network has, so that it is what a child spends and what is shown."""
    if channel.closing is None:
        return Accepted(channel)
    kept = _replace(channel, state=State.PUBLISHED, closing=_replace(channel.closing, settlement=command.settlement))
    return Accepted(channel if kept == channel else kept)


def _confirmed(channel: Channel, command: Confirmed, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Note the txid where it is not the newest settlement's: an earlier one was mined, or somebody changed it."""
    closing = channel.closing
    if closing is None or closing.settlement is None:
        return Accepted(channel)
    named = channel.moves or command.txid != closing.settlement.txid
    closing = _replace(closing, spent_by=command.txid if named else b"")
    return Accepted(_replace(channel, state=State.CLOSED, closing=closing))


def _vanished(channel: Channel, command: Vanished, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """Back to CLOSING; the stored settlement is published again."""
    return Accepted(_replace(channel, state=State.CLOSING))


def _adopt(channel: Channel, command: Adopt, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """A record from a backup goes on from what was signed after it; see `adoption`."""
    return adopted(channel, command, view)


def _lost(channel: Channel, command: SpentElsewhere, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    closing = channel.closing or Closing(CloseReason.EXPIRY, view.paying_time)
    return Accepted(
        _replace(
            channel, state=State.LOST, offered=None, offered_data="", closing=_replace(closing, spent_by=command.txid)
        )
    )


def _repeat_close(channel: Channel, command: Command, view: View, _verifier: PaymentVerifier | None) -> Outcome:
    """A settled channel gives the same answer again; one that goes on elsewhere is to be closed there."""
    return Rejected(end_of(channel)) if channel.moves else Accepted(channel)


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
    if closing is not None and channel.moves:
        to = OutPoint(closing.spent_by, 0)
        return ChannelMoved(outpoint=str(to), funding_sat=channel.payment.change_sat) if to.txid else ChannelMoving()
    if channel.state in (State.PUBLISHED, State.CLOSED) and closing is not None and closing.settlement is not None:
        return ChannelClosed(txid=(closing.spent_by or closing.settlement.txid)[::-1].hex())
    return ChannelClosing()


def forged(
    channel: Channel, command: Pay | CloseByProof | CloseByPayment, verifier: PaymentVerifier | None = None
) -> PaychanError | None:
    """Return why a command's payment is not one of the client's, or None. It need not be good for anything else."""
    payment = command.payment
    if payment in (channel.payment, channel.offered):
        return None
    script = (command.change_script if isinstance(command, CloseByPayment) else None) or channel.change_script
    problem = change_problem(payment, Sat(0))
    if problem is None:
        if verifier is None or script != channel.change_script:
            verifier = PaymentVerifier(channel.terms, channel.outpoint, script)
        problem = verifier.problem(payment)
    return problem


def _not_newest(channel: Channel, command: CloseByProof, verifier: PaymentVerifier | None) -> Rejected:
    newest = NotNewestPayment(got_sat=command.payment.change_sat, need_sat=channel.payment.change_sat)
    return Rejected(forged(channel, command, verifier) or newest)


def _pending(offered: Payment) -> PaymentPending:
    return PaymentPending(change_sat=offered.change_sat)


TRANSITIONS: dict[State, dict[type[Struct], Transition]] = {
    State.OPEN: {
        Pay: _pay,
        Answer: _answer,
        CloseByProof: _close_by_proof,
        CloseByPayment: _close_by_payment,
        Close: _close_by_us,
        Signed: _unchanged,
        Published: _unchanged,
        Kept: _unchanged,
        Confirmed: _unchanged,
        Vanished: _unchanged,
        SpentElsewhere: _lost,
        Adopt: _adopt,
    },
    State.CLOSING: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _ended,
        CloseByPayment: _ended,
        Close: _unchanged,
        Signed: _signed,
        Published: _published,
        Kept: _kept,
        Confirmed: _unchanged,
        Vanished: _unchanged,
        SpentElsewhere: _lost,
        Adopt: _adopt,
    },
    State.PUBLISHED: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _repeat_proof,
        CloseByPayment: _repeat_close,
        Close: _unchanged,
        Signed: _signed,
        Published: _unchanged,
        Kept: _kept,
        Confirmed: _confirmed,
        Vanished: _vanished,
        SpentElsewhere: _lost,
        Adopt: _adopt,
    },
    State.CLOSED: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _repeat_proof,
        CloseByPayment: _repeat_close,
        Close: _unchanged,
        Signed: _unchanged,
        Published: _unchanged,
        Kept: _unchanged,
        Confirmed: _unchanged,
        Vanished: _vanished,
        SpentElsewhere: _lost,
        Adopt: _unchanged,
    },
    State.LOST: {
        Pay: _ended,
        Answer: _ended,
        CloseByProof: _ended,
        CloseByPayment: _ended,
        Close: _ended,
        Signed: _unchanged,
        Published: _unchanged,
        Kept: _unchanged,
        Confirmed: _unchanged,
        Vanished: _unchanged,
        SpentElsewhere: _unchanged,
        Adopt: _unchanged,
    },
}
