"""Adoption: a record from a backup takes over the claim and settlement that the signer signed after the backup.

For each funding output the signer remembers the newest settlement that it signed. The claim in it holds two facts that
a restored record may lack: the client's newest payment, and the change script that the client closed to. A server that
adopts both can continue with any fee, like the server that was lost.

The newer of two claims is:

* The one that leaves the client less. Payments only ever lower the change.
* At the same change, the one with the script that a closing client asked for. If the client closed the record's
  channel, the record holds that script already, because a closing channel accepts no other; the record stays as it is.
  Any other record adopts the signer's claim.
"""

from __future__ import annotations

import msgspec

from paychan.protocol.channel import (
    Accepted,
    Adopt,
    Channel,
    CloseReason,
    Closing,
    Outcome,
    Rejected,
    State,
    View,
    delivered,
)
from paychan.protocol.errors import PaychanError, SigningFailed
from paychan.protocol.settlement import Claim

_replace = msgspec.structs.replace

"""The signer has accepted this change value already, so the dust limit is not checked again; only the flag is."""


def is_older(claim: Claim, channel: Channel) -> bool:
    """Say whether the signer's claim is older than the record's: then the settlement of the claim must be replaced."""
    if claim.payment.change_sat != channel.payment.change_sat:
        return claim.payment.change_sat > channel.payment.change_sat
    asked = channel.closing is not None and channel.closing.reason is CloseReason.CLIENT
    return claim.change_script != channel.change_script and asked


def adopted(channel: Channel, command: Adopt, view: View) -> Outcome:
    """Take over a claim, unless it is older than the record's, and its settlement, unless the record's pays more.

    An open channel whose settlement is signed always leaves OPEN, because the settlement may confirm at any time. An
    open channel whose payment the signer has only seen, not signed, stays open at the newer payment.
    """
    claim, signed = command.claim, command.settlement
    problem = _problem(channel, claim)
    if problem is not None:
        return Rejected(problem)
    is_open, older = channel.state is State.OPEN, is_older(claim, channel)
    known = channel.closing.settlement if channel.closing else None
    same = (claim.payment.change_sat, claim.change_script) == (channel.payment.change_sat, channel.change_script)
    dearer = signed is not None and not older and (known is None or signed.is_dearer_than(known))
    if not (dearer or (is_open and signed) or not (older or same)):
        return Accepted(channel)
    reason = _reason(channel, claim, view)
    payment = (channel if older else claim).payment
    script = (channel if older else claim).change_script
    changed = delivered(_replace(channel, change_script=script, offered=None, offered_data=""), payment)
    if not (older or same):  # the application may know payments that the signer has not seen
        changed = _replace(changed, restored=True)
    if is_open and signed is None and reason not in (CloseReason.DRAINED, CloseReason.CLIENT):
        return Accepted(changed)
    closing = _replace(channel.closing or Closing(reason, view.paying_time), settlement=None if older else signed)
    return Accepted(_replace(changed, state=State.CLOSING, closing=closing))


def _problem(channel: Channel, claim: Claim) -> PaychanError | None:
    """Check the signer's claim as strictly as a payment from an unknown client."""
    if (claim.outpoint, claim.terms, claim.funding_sat) != (channel.outpoint, channel.terms, channel.funding_sat):
        return SigningFailed(reason=f"the signer shows a claim of another channel, {claim.outpoint}")
    return claim.problem()


def _reason(channel: Channel, claim: Claim, view: View) -> CloseReason:
    """Derive why the channel was being settled: only a client changes the script, only a last payment leaves nothing.

    A settlement that pays the change back to the funding script may have been a withdrawal, if the channel can continue
    there. It is treated as one until payments end, so that the client can go on paying.
    """
    if claim.payment.change_sat == 0:
        return CloseReason.DRAINED
    if claim.change_script != channel.change_script:
        return CloseReason.CLIENT
    can_go_on = bool(channel.secret) and claim.change_script == claim.terms.funding_script
    in_time = claim.terms.expiry.left(view) > view.rules.settlement_period_seconds
    return CloseReason.WITHDRAW if can_go_on and in_time else CloseReason.OPERATOR
