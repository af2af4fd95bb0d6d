"""Withdrawals: the server settles the received value, and the channel continues at the change output."""

from __future__ import annotations

from typing import Any

import msgspec

from paychan.protocol.channel import Accepted, Channel, Outcome, State, View, can_move
from paychan.protocol.errors import ChannelExpiring, NotWithdrawable, PaychanError, PaymentPending
from paychan.protocol.wire.rbpcp import opening_secret


def publishes_secret(channel: Channel) -> bool:
    """Say whether settling now would publish the channel's secret: the hash of the opening payment's signature.

    Then the server withdraws nothing, because the channel would continue under a secret that every reader of the chain
    knows. After one more payment, of any value, the settlement contains that payment instead. A new secret for the
    continued channel would not help: a reader of the old secret asks for the new outpoint as the client does.
    """
    return opening_secret(channel.payment) == channel.secret


def can_withdraw(channel: Channel) -> bool:
    """Say whether the received value of an open channel can be withdrawn now."""
    return can_move(channel) and not publishes_secret(channel)


def withdrawal_problem(channel: Channel, view: View) -> PaychanError | None:
    if not can_move(channel):
        return NotWithdrawable(reason="its change does not go back to its funding address")
    if publishes_secret(channel):
        return NotWithdrawable(reason="it would publish the channel's secret, until the client has paid once more")
    if channel.offered is not None:
        return PaymentPending(change_sat=channel.offered.change_sat)
    left = channel.terms.expiry.left(view) - view.rules.settlement_period_seconds
    return ChannelExpiring(now_unix=view.now, limit_unix=view.now + left) if left <= 0 else None


def taken_back(channel: Channel, _command: Any, _view: View, _verifier: Any) -> Outcome:
    """Reopen a channel whose withdrawal was cancelled before a signature was made; it accepts payments as before."""
    if not channel.moves or channel.closing is None or channel.closing.settlement is not None:
        return Accepted(channel)
    return Accepted(msgspec.structs.replace(channel, state=State.OPEN, closing=None))
