"""Refuse payments, and name numbers of a channel only to a caller that shows a payment signed by the client.

The signature of a payment is checked before its value. So a caller that only knows the outpoint learns neither the
newest change value nor whether a payment waits for the application.

A client with an old copy of its wallet learns the newest payment from the refusal. The refusal proves it by a hash of
the client's signature (`Payment.proof`): the client takes over no number that it did not sign. The signature itself
stays here, since with it a caller that saw an old payment could close the channel.
"""

from __future__ import annotations

from paychan.protocol.channel import Channel, CloseByPayment, CloseByProof, Pay
from paychan.protocol.errors import NotNewestPayment, PaychanError, ValueBackwards
from paychan.protocol.payment import Payment, PaymentVerifier


def forged(
    channel: Channel, command: Pay | CloseByProof | CloseByPayment, verifier: PaymentVerifier | None = None
) -> PaychanError | None:
    """Return why the client did not sign a command's payment, or None. No other rule is checked."""
    payment = command.payment
    if payment in (channel.payment, channel.offered):
        return None
    script = (command.change_script if isinstance(command, CloseByPayment) else None) or channel.change_script
    if verifier is None or script != channel.change_script:
        verifier = channel.verifier(script)
    return verifier.problem(payment)


def not_newest(channel: Channel, command: CloseByProof, verifier: PaymentVerifier | None) -> PaychanError:
    """Return the refusal of a payment that is not the channel's newest."""
    have = channel.payment
    newest = NotNewestPayment(got_sat=command.payment.change_sat, need_sat=have.change_sat, newest_sha256=have.proof)
    return forged(channel, command, verifier) or newest


def not_below(channel: Channel, payment: Payment) -> ValueBackwards:
    """Return the refusal of a payment with a valid signature that leaves more than the channel's newest."""
    have = channel.payment
    return ValueBackwards(got_sat=payment.change_sat, need_sat=have.change_sat, newest_sha256=have.proof)
