"""What the chain shows of a channel, against its record: the chain's word counts.

A record can lack what spends its funding output: it comes from a backup, or another process of the operator settled
the channel (`paychan settle --offline`). The spending transaction tells all that the record lacks. Its branch says whose
it is: the server's branch needs our signature, so it is a settlement of this operator; the other one is the client's refund.
Its script holds the client's newest payment, and its outputs where the change went.

A settlement that pays the change back to the funding script of a channel that can go on is a move, unless the record had
signed it for another reason itself, or it publishes the channel's secret, for nothing is withdrawn by such a payment. The
channel goes on at output 0, where it may have received more since.
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
)
from paychan.protocol.kinds.sighash import SINGLE_ANYONECANPAY
from paychan.protocol.payment import Payment
from paychan.protocol.settlement import Claim, server_pushes
from paychan.protocol.types import Sat
from paychan.protocol.wire.rbpcp import opening_secret

_replace = msgspec.structs.replace

_PUSHES = 4
"""`<client sig> <server sig> <selector> <redeem script>`; what lies below on the stack is not read by the script."""


def read_claim(channel: Channel, transaction: bytes) -> Claim | None:
    """Read what a transaction settles of a channel; None if it does not spend it by the server's branch."""
    whole = CTransaction.deserialize(transaction)
    pushes = server_pushes(whole, channel.outpoint)
    if pushes is None:
        return None
    index, stack = pushes
    signed = stack[-_PUSHES] if len(stack) >= _PUSHES else b""
    change_sat, script = Sat(0), channel.change_script
    if signed[-1:] == bytes([SINGLE_ANYONECANPAY]) and index < len(whole.vout):
        change_sat, script = Sat(whole.vout[index].nValue), bytes(whole.vout[index].scriptPubKey)
    payment = Payment(change_sat, signed[:-1], signed[-1]) if signed else channel.payment
    return Claim(channel.terms, channel.outpoint, channel.funding_sat, script, payment)


def is_behind(claim: Claim, channel: Channel) -> bool:
    """Say whether the record holds a newer payment than a settlement that was found."""
    return claim.payment.change_sat > channel.payment.change_sat


def lags(channel: Channel) -> bool:
    """Say whether the stored settlement pays less than the record's payment: it was found, and the record is newer.

    It is then worth replacing while it is not confirmed. A withdrawal never is: the channel goes on at its output.
    """
    settlement = channel.closing.settlement if channel.closing else None
    claim = read_claim(channel, settlement.transaction) if settlement and not channel.moves else None
    return claim is not None and is_behind(claim, channel)


def is_news(claim: Claim, channel: Channel) -> bool:
    """Say whether a settlement that was found tells something that the record's own does not."""
    if channel.closing is None or channel.closing.settlement is None:
        return True
    return (claim.payment.change_sat, claim.change_script) != (channel.payment.change_sat, channel.change_script)


def found(channel: Channel, command: Found, view: View, _verifier: object = None) -> Outcome:
    """Take over a settlement that spends the funding output; watching it tells how it ends.

    While it is not deep, the record's own word counts where it has one: its own settlement replaces this one, and so does
    one for a newer payment. Once it is deep the record follows it, but never forgets a newer payment.
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
        channel = _replace(channel, payment=claim.payment, change_script=claim.change_script)
    settled = _replace(begun, settlement=command.settlement)
    return Accepted(_replace(channel, state=State.PUBLISHED, offered=None, offered_data="", closing=settled))


_ENDED = (State.LOST, State.UNFUNDED)


def _reason(channel: Channel, claim: Claim) -> CloseReason:
    """Tell why a channel was settled, which the record may not know."""
    closing = channel.closing
    if closing is not None and not is_news(claim, channel):
        return closing.reason
    goes_back = claim.payment.change_sat > 0 and claim.change_script == channel.terms.funding_script
    if can_move(channel) and goes_back and opening_secret(claim.payment) != channel.secret:
        return CloseReason.WITHDRAW
    if not claim.payment.change_sat:
        return CloseReason.DRAINED
    return CloseReason.CLIENT if claim.change_script != channel.change_script else CloseReason.OPERATOR
