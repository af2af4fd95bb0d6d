"""Forged payments: a refusal names numbers of a channel only to a caller that shows a payment signed by the client.

The signature of a payment is checked before its value. So a caller that only knows the outpoint learns neither the
newest change value nor whether a payment waits for the application.
"""

from __future__ import annotations

from paychan.protocol.channel import Channel, CloseByPayment, CloseByProof, Pay
from paychan.protocol.errors import NotNewestPayment, PaychanError
from paychan.protocol.payment import PaymentVerifier


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
    newest = NotNewestPayment(got_sat=command.payment.change_sat, need_sat=channel.payment.change_sat)
    return forged(channel, command, verifier) or newest
