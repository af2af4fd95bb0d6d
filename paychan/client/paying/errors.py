"""Errors of paid answers and of offers, which have no place in the tree of `paychan.client.errors` for its size."""

from __future__ import annotations

from paychan.client.errors import ClientError, Declined


class BodyUnpaid(ClientError):
    """The answer ends here, because its next unit is not paid. `cause` is the code of the reason, "" for a lost connection."""

    code = "body_unpaid"
    text = "the answer of {url} ends here, after {delivered} {unit}(s) for {paid_sat} sat: {reason}"


class IdentityChanged(Declined):
    """A seller names another identity key for a server than the one that took the channel's payments."""

    code = "identity_changed"
    text = (
        "the seller at {host} says that {pay_url} has the identity key {got}, but channel {channel} knows it by {want}. "
        "Nothing was paid: ask the seller which key is right"
    )
