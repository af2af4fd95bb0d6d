"""The way out of OPEN: a channel begins to close only if its settlement can be relayed and leaves value."""

from __future__ import annotations

import msgspec

from paychan.protocol.channel import Accepted, Channel, CloseReason, Closing, Outcome, Rejected, State, View
from paychan.protocol.errors import NotEconomical
from paychan.protocol.fees import Shortfall, floor_problem, least_fee
from paychan.protocol.offering import with_offer_booked
from paychan.protocol.types import Sat

_replace = msgspec.structs.replace


def close(
    channel: Channel, reason: CloseReason, view: View, value_sat: Sat = Sat(0), client_fee_sat: Sat = Sat(0)
) -> Outcome:
    """Leave OPEN, unless the network would not relay the settlement or its fee would take all received value.

    An offered payment stays offered; the fee is judged as if the payment were booked, and for the largest destination
    script.
    """
    closing = _replace(
        channel,
        state=State.CLOSING,
        closing=Closing(reason, view.paying_time, client_fee_sat),
    )
    plan = least_fee(with_offer_booked(closing), view.rules)
    if isinstance(plan, Shortfall):
        return Rejected(NotEconomical(got_sat=plan.received_sat, need_sat=plan.needed_sat))
    problem = floor_problem(with_offer_booked(closing), view)
    return Rejected(problem) if problem is not None else Accepted(closing, value_sat)
