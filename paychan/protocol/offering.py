"""Offered payments: payments that wait for the application's answer.

Such a payment is verified and stored, but not booked. The application may have delivered already, so a missing answer
is not a refusal:

* While the channel is open, the server asks the application again with the client's next request, before it judges that
  request.
* When the server closes the channel (expiry, operator), the payment stays offered. The server asks the application
  until half of the time to the fee deadline has passed; later the settlement could cost more than the payment is worth.
  Then `Rules.unanswered_counts` decides: settle the payment, which the client has signed (the default), or drop it.
* When the client closes the channel, the server asks once more before it closes. Without an answer the payment is
  dropped: a client must be able to close while the application is down. If the client shows the offered payment as its
  newest, or makes a closing payment that includes it, the client confirms the payment, and it is booked.
"""

from __future__ import annotations

import msgspec

from paychan.protocol.channel import Accepted, Answer, Channel, Outcome, View, delivered
from paychan.protocol.fees import is_urgent
from paychan.protocol.payment import Payment
from paychan.protocol.types import Sat

_replace = msgspec.structs.replace


def answered(channel: Channel, command: Answer) -> Outcome:
    """Take the application's answer for the offered payment of a closing channel."""
    return _decided(channel, command.data, counts=not command.refusal)


def unanswered(channel: Channel, view: View) -> Outcome:
    """Decide about an offered payment of a closing channel without an answer; no change while there is time to ask."""
    if view.rules.asks_application and not is_urgent(channel, view.rules, view.now):
        return Accepted(channel)
    return _decided(channel, counts=view.rules.unanswered_counts)


def decided_by_client(channel: Channel, closing: Payment) -> Channel:
    """Book the offered payment if the client's closing payment includes it, else drop it."""
    if channel.offered is None:
        return channel
    return _settle_offer(channel, counts=closing.change_sat <= channel.offered.change_sat)


def with_offer_booked(channel: Channel) -> Channel:
    """Return the channel as if its offered payment were booked."""
    return _settle_offer(channel, counts=True)


def _decided(channel: Channel, data: str = "", *, counts: bool) -> Outcome:
    changed = _settle_offer(channel, counts=counts)
    return Accepted(changed, Sat(channel.payment.change_sat - changed.payment.change_sat), data)


def _settle_offer(channel: Channel, *, counts: bool) -> Channel:
    offered = channel.offered
    if counts and offered is not None and offered.change_sat < channel.payment.change_sat:
        channel = _replace(delivered(channel, offered), payments=channel.payments + 1, restored=False)
    return _replace(channel, offered=None, offered_data="")
