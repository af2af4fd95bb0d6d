"""Refusals of a channel that left OPEN: why it accepts nothing more, and where it continues."""

from __future__ import annotations

from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import (
    ChannelClosed,
    ChannelClosing,
    ChannelLost,
    ChannelMoved,
    ChannelMoving,
    NeverFunded,
    PaychanError,
)
from paychan.protocol.types import OutPoint


def end_of(channel: Channel) -> PaychanError:
    """Return the refusal with which a channel outside OPEN answers."""
    closing = channel.closing
    if channel.state is State.LOST and closing is not None:
        return ChannelLost(txid=closing.spent_by[::-1].hex())
    if channel.state is State.UNFUNDED:
        return NeverFunded()
    if closing is not None and channel.moves:
        to = OutPoint(closing.spent_by, 0)
        return ChannelMoved(outpoint=str(to), funding_sat=channel.moved_sat) if to.txid else ChannelMoving()
    if channel.state in (State.PUBLISHED, State.CLOSED) and closing is not None and closing.settlement is not None:
        return ChannelClosed(txid=(closing.spent_by or closing.settlement.txid)[::-1].hex())
    return ChannelClosing()
