"""Writes the frozen samples of stored records, one hex file for each kind of record of each version.

Run `python -m tests.vectors.record.generate` from the root of the repository after the record's layout got a new
version or field, or to add a sample: it writes those that are missing and never touches one that is there. What is
committed here must decode for ever, because stores hold such records; `tests/protocol/test_record.py` says what each
one means. The channels come out of the real machine, with keys that follow from a text.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from paychan.protocol.channel import (
    Channel,
    Close,
    CloseByPayment,
    CloseByProof,
    CloseReason,
    Confirmed,
    Pay,
    Published,
    Signed,
    SpentElsewhere,
    State,
    Unfunded,
    Vanished,
    View,
)
from paychan.protocol.charges import Charge, Release
from paychan.protocol.opening import open_channel, successor
from paychan.protocol.payment import sign_payment
from paychan.protocol.record import VERSION, encode_record
from paychan.protocol.state_machine import apply
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.rbpcp import opening_secret
from tests.lib.channels import RULES, SERVER_DESTINATION, VIEW, Payer, accepted, confirmed, found_by, step

DIRECTORY = Path(__file__).parent

_replace = msgspec.structs.replace


def samples() -> dict[str, Channel]:
    """Every kind of record that a store may hold, by name."""
    payer = Payer("frozen sample")
    late = Payer("frozen sample", UnixTime(2**31))
    opened = payer.channel()
    paid = payer.pay(payer.pay(opened), 5_000)
    closing = step(paid, Close(CloseReason.EXPIRY))
    signed = step(closing, Signed(payer.settlement(closing)))
    published = step(signed, Published())
    drained = step(paid, Pay(payer.payment(0)))
    drained_signed = step(drained, Signed(payer.settlement(drained)))
    closed = step(published, confirmed(published))
    mover = Payer("frozen sample", movable=True)
    moving = mover.history(State.CLOSED, reason=CloseReason.WITHDRAW)
    return {
        "open": opened,
        "open_v2": _opened_in_v2(late),
        "open_paid": paid,
        "open_offered": _offered(payer, paid),
        "open_restored": _replace(paid, restored=True),
        "open_charged": _charged(payer, paid),
        "closing_expiry": closing,
        "closing_offered": step(_offered(payer, paid), Close(CloseReason.EXPIRY)),
        "closing_proof": step(paid, CloseByProof(paid.payment)),
        "closing_payment": _closed_to_another_address(payer, paid),
        "closing_operator": step(opened, Close(CloseReason.OPERATOR)),
        "closing_drained": drained,
        "closing_signed": signed,
        "closing_vanished": step(published, Vanished()),
        "published": published,
        "closing_outbid": step(published, Signed(payer.settlement(published, RULES.fee_sat_per_vb * 2))),
        "closed": closed,
        "closed_malleated": step(published, Confirmed(b"\x4d" * 32)),
        "closed_drained": step(step(drained_signed, Published()), confirmed(drained_signed)),
        "closing_withdraw": moving[1],
        "closed_withdrawn": moving[-1],
        "open_moved": successor(moving[-1], VIEW.now),
        "unfunded_open": step(opened, Unfunded()),
        "unfunded_published": step(published, Unfunded()),
        "published_found": step(opened, found_by(payer, paid)),
        "lost_open": step(opened, SpentElsewhere(b"\x4c" * 32)),
        "lost_published": step(published, SpentElsewhere(b"\x4c" * 32)),
    }


def _opened_in_v2(payer: Payer) -> Channel:
    opening = payer.opening()
    named = _replace(opening, secret=opening_secret(opening.payment))
    return accepted(open_channel(named, VIEW))


def _offered(payer: Payer, channel: Channel) -> Channel:
    """A payment is waiting for the application's word."""
    asking = View(VIEW.now, _replace(RULES, asks_application=True))
    pay = Pay(payer.payment(channel.payment.change_sat - 700), "an order")
    return accepted(apply(channel, pay, asking))


def _charged(payer: Payer, channel: Channel) -> Channel:
    """A payment pays for one request and leaves credit; another request is paid from it, and half of that comes back."""
    payment = payer.payment(channel.payment.change_sat - 900)
    channel = step(channel, Charge(b"\x01" * 16, Sat(500), payment))
    channel = step(channel, Charge(b"\x02" * 16, Sat(300), None, frozenset([b"\x01" * 16])))
    return step(channel, Release(b"\x02" * 16, Sat(150)))


def _closed_to_another_address(payer: Payer, channel: Channel) -> Channel:
    """The client's last payment is a fee of 4,000 sat, and its change goes elsewhere."""
    change_sat = Sat(channel.payment.change_sat - 4_000)
    payment = sign_payment(payer.key, payer.terms, payer.outpoint, payer.funding_sat, SERVER_DESTINATION, change_sat)
    return step(channel, CloseByPayment(payment, SERVER_DESTINATION))


def main() -> None:
    """Write the samples of the present version that are missing."""
    for name, channel in samples().items():
        path = DIRECTORY / f"v{VERSION}_{name}.hex"
        if not path.exists():
            path.write_text(encode_record(channel).hex() + "\n")


if __name__ == "__main__":
    main()
