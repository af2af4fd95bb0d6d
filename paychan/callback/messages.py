"""The messages to the application, version 1: `paid`, which is a question, and what a channel's record tells.

`paychan/callback/README.md` shows every body. A version gets further keys, and loses or changes none; else it takes
another number. Pure functions of records.
"""

from __future__ import annotations

from msgspec import Struct

from paychan.callback.base import question_key
from paychan.protocol.address import encode_address
from paychan.protocol.channel import Channel
from paychan.protocol.types import Network, Sat
from paychan.protocol.wire.rbpcp import Dialect, PaymentData, payment_data

VERSION = 1


class FullPayment(Struct, frozen=True):
    """The offered payment as a v2 body, and the client's text."""

    payment_data: PaymentData
    application_data: str = ""


class Question(Struct, frozen=True, kw_only=True):
    """The keys of rbpcp-api, and further ones: to recognize a repeated question, and to credit by totals."""

    value_received: Sat
    chan_value_left: Sat
    chan_total_capacity: Sat
    client_pubkey: str
    full_payment: FullPayment
    channel_id: str
    idempotency_key: str
    received_sat: Sat
    """All that the channel has paid, including this payment."""
    restored: bool
    """The record is from a backup: `value_received` may include payments that the application has accepted before."""
    version: int = VERSION
    type: str = "paid"
    sequence: int
    """Sequence number of the channel's record that first held the payment; a later payment has a higher one."""


def question(channel: Channel, network: Network) -> Question:
    """Make the question about `channel.offered`; repeated, it has the same bytes.

    Raises:
        ValueError: the channel offers no payment.
    """
    offered = channel.offered
    if offered is None:
        msg = f"nothing is offered on {channel.outpoint}"
        raise ValueError(msg)
    data = payment_data(
        offered,
        Dialect.A,
        redeem_script=channel.terms.redeem_script.hex(),
        funding_txid=channel.outpoint.txid_hex,
        funding_vout=channel.outpoint.vout,
        change_address=encode_address(channel.change_script, network),
    )
    return Question(
        value_received=Sat(channel.payment.change_sat - offered.change_sat),
        chan_value_left=offered.change_sat,
        chan_total_capacity=channel.funding_sat,
        client_pubkey=channel.terms.client_key.hex(),
        full_payment=FullPayment(data, channel.offered_data),
        channel_id=str(channel.outpoint),
        idempotency_key=question_key(channel),
        received_sat=Sat(channel.funding_sat - offered.change_sat),
        restored=channel.restored,
        sequence=channel.offered_seq,
    )
