"""Settlements found in the chain: a record takes over the transaction that spends its funding output.

A record can lack the transaction that spends its funding output: the record comes from a backup, or another process of
the operator settled the channel (`paychan settle --offline`). The spending transaction holds everything that the record
lacks. Its branch shows the author: the server's branch needs the server's signature, so it is a settlement of this
operator; the other branch is the client's refund. Its script holds the client's newest payment, and its outputs the
change script.

A settlement that pays the change back to the funding script is a move, if the channel can continue there. Two
exceptions: the record itself had it signed for another reason, or it publishes the channel's secret, which no
withdrawal does. A moved channel continues at output 0, where it may have received more since.
"""

from __future__ import annotations

import msgspec
from bitcoin.core import CTransaction

from paychan.protocol.channel import (
    Accepted,
    Channel,
    CloseReason,
    Closing,
    Found,
    Outcome,
    State,
    View,
    can_move,
    delivered,
)
from paychan.protocol.payment import Payment
from paychan.protocol.settlement import Claim, spend_of
from paychan.protocol.types import Sat
from paychan.protocol.wire.rbpcp import opening_secret

_replace = msgspec.structs.replace


def read_claim(channel: Channel, transaction: bytes) -> Claim | None:
    """Read the claim of a channel that a transaction settles; None if it does not spend by the server's branch."""
    whole = CTransaction.deserialize(transaction)
    found = spend_of(whole, channel.outpoint)
    if found is None or not found[1].by_server:
        return None
    index, signed = found[0], found[1].client_signature
    change_sat, script = Sat(0), channel.change_script
    if signed[-1:] == bytes([channel.terms.kind.change_flag]) and index < len(whole.vout):
        change_sat, script = Sat(whole.vout[index].nValue), bytes(whole.vout[index].scriptPubKey)
    payment = Payment(change_sat, signed[:-1], signed[-1]) if signed else channel.payment
    return Claim(channel.terms, channel.outpoint, channel.funding_sat, script, payment)


def is_behind(claim: Claim, channel: Channel) -> bool:
    """Say whether the record holds a newer payment than a settlement found in the chain."""
    return claim.payment.change_sat > channel.payment.change_sat


def lags(channel: Channel) -> bool:
    """Say whether the stored settlement settles an older payment than the record's: it was found in the chain.

    Such a settlement should be replaced while it is unconfirmed. A withdrawal is never replaced: the channel continues
    at its output.
    """
    settlement = channel.closing.settlement if channel.closing else None
    claim = read_claim(channel, settlement.transaction) if settlement and not channel.moves else None
    return claim is not None and is_behind(claim, channel)


def is_news(claim: Claim, channel: Channel) -> bool:
    """Say whether a settlement found in the chain holds another payment or change script than the record."""
    if channel.closing is None or channel.closing.settlement is None:
        return True
    return (claim.payment.change_sat, claim.change_script) != (channel.payment.change_sat, channel.change_script)


def found(channel: Channel, command: Found, view: View, _verifier: object = None) -> Outcome:
    """Take over a settlement that spends the funding output; the channel is watched from then on.

    While the found settlement is not deep, the record's own one takes precedence, and so does a new one for a newer
    payment. Once the found settlement is deep, the record takes it over, but keeps a newer payment.
    """
    closing, claim, ended = channel.closing, command.claim, channel.state in _ENDED
    own = closing.settlement if closing else None
    if own is not None and not ended and (own.txid == command.settlement.txid or not command.deep):
        return Accepted(channel)
    reason = _reason(channel, claim)
    begun = _replace(closing, reason=reason, spent_by=b"") if closing else Closing(reason, view.paying_time)
    if is_behind(claim, channel) and not command.deep:
        if channel.state is State.CLOSING:
            return Accepted(channel)
        again = _replace(closing, spent_by=b"") if closing else begun
        return Accepted(_replace(channel, state=State.CLOSING, offered=None, offered_data="", closing=again))
    if not is_behind(claim, channel):
        channel = delivered(_replace(channel, change_script=claim.change_script), claim.payment)
    settled = _replace(begun, settlement=command.settlement)
    return Accepted(_replace(channel, state=State.PUBLISHED, offered=None, offered_data="", closing=settled))


_ENDED = (State.LOST, State.UNFUNDED)


def _reason(channel: Channel, claim: Claim) -> CloseReason:
    """Derive why a channel was settled; the record may not hold the reason."""
    closing = channel.closing
    if closing is not None and not is_news(claim, channel):
        return closing.reason
    goes_back = claim.payment.change_sat > 0 and claim.change_script == channel.terms.funding_script
    if can_move(channel) and goes_back and opening_secret(claim.payment) != channel.secret:
        return CloseReason.WITHDRAW
    if not claim.payment.change_sat:
        return CloseReason.DRAINED
    return CloseReason.CLIENT if claim.change_script != channel.change_script else CloseReason.OPERATOR
