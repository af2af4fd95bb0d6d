"""Whether what a channel received can be withdrawn while it goes on at the change output."""

from __future__ import annotations

from typing import Any

import msgspec

from paychan.protocol.channel import Accepted, Channel, Outcome, State, View, can_move
from paychan.protocol.errors import ChannelExpiring, NotWithdrawable, PaychanError, PaymentPending
from paychan.protocol.wire.rbpcp import opening_secret


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


def withdrawal_problem(channel: Channel, view: View) -> PaychanError | None:
    limit = channel.terms.expiry - view.rules.settlement_period_seconds
    if not can_move(channel):
        return NotWithdrawable(reason="its change does not go back to its funding address")
    if publishes_secret(channel):
        return NotWithdrawable(reason="it would publish the channel's secret, until the client has paid once more")
    if channel.offered is not None:
        return PaymentPending(change_sat=channel.offered.change_sat)
    return ChannelExpiring(now_unix=view.now, limit_unix=limit) if view.now >= limit else None


def taken_back(channel: Channel, _command: Any, _view: View, _verifier: Any) -> Outcome:
    """Open a channel again whose withdrawal was given up before anything was signed; it takes payments as before."""
    if not channel.moves or channel.closing is None or channel.closing.settlement is not None:
        return Accepted(channel)
    return Accepted(msgspec.structs.replace(channel, state=State.OPEN, closing=None))
