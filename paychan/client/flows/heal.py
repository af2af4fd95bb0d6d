"""Take over the newest payment from the server when this wallet is an old copy: a backup, or a copy that stayed behind.

The client trusts no number. The server's refusal has the newest change value, and the SHA-256 of the signature under
it (`Payment.proof`). The client signs that change value itself, which gives the same bytes again (RFC 6979), and
compares: a server can show the hash of no signature that this key did not make. Whatever this key signed, the server
may use anyway, so taking it over costs nothing.
"""

from __future__ import annotations

import msgspec

from paychan.client.record import ChannelRecord, State
from paychan.client.transport.answers import refusal
from paychan.client.transport.effects import Response
from paychan.protocol.types import Sat

_replace = msgspec.structs.replace


def proven_newest(record: ChannelRecord, response: Response) -> Sat | None:
    """Return the change value of a payment that is newer than the wallet's, if a refusal proves it; else None."""
    if response.status != 400:
        return None
    error = refusal(response)
    newest, proof = error.fields.get("need_sat"), error.fields.get("newest_sha256")
    if error.code not in ("value_backwards", "not_newest_payment") or type(newest) is not int:
        return None
    if not 0 <= newest < record.agreed_sat or record.sign(Sat(newest)).proof != proof:
        return None
    return Sat(newest)


def taken_over(record: ChannelRecord, newest: Sat) -> ChannelRecord:
    """Return the record after a payment of this key that leaves `newest`: both sides know it.

    A closing under way offers the same fee again, if the change has room for it.
    """
    fee_sat = None if record.closing_sat is None else Sat(record.agreed_sat - record.closing_sat)
    there = _replace(
        record,
        acknowledged_sat=newest,
        signed_sat=min(record.left_sat, newest),
        refused=record.refused and record.left_sat < newest,
        state=State.OPEN if record.state is State.NEW else record.state,
    )
    return there if fee_sat is None else with_closing(there, fee_sat)


def with_closing(there: ChannelRecord, fee_sat: Sat) -> ChannelRecord:
    """Offer a fee for closing, or none if the change has no room for it."""
    closing = there.agreed_sat - fee_sat
    if closing < 0 or 0 < closing < there.dust_sat:
        closing = there.agreed_sat
    return _replace(there, closing_sat=Sat(closing), signed_sat=min(there.left_sat, Sat(closing)))
