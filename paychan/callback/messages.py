"""The messages to the application, version 1: `paid`, which is a question, and what a channel's record tells.

`paychan/callback/README.md` shows every body. A version gets further keys, and loses or changes none; else it takes
another number. Pure functions of records.
"""

from __future__ import annotations

from enum import Enum
from hashlib import sha256

from msgspec import Struct
from msgspec.structs import replace

from paychan.callback.base import question_key
from paychan.protocol.address import encode_address
from paychan.protocol.channel import Channel, Closing, State
from paychan.protocol.settlement import outpoints_of
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.protocol.wire.rbpcp import Dialect, PaymentData, payment_data

VERSION = 1

_UNFUNDED, _SPENT = "unfunded", "spent"
"""Why a channel is lost: its funding was replaced and never confirmed, or another transaction spent it."""


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


class Kind(Enum):
    """Kinds of messages about a channel's life; the value is their `type`."""

    OPENED = "opened"
    CLOSING = "closing"
    SETTLED = "settled"
    LOST = "lost"


_KINDS = {
    State.OPEN: Kind.OPENED,
    State.CLOSING: Kind.CLOSING,
    State.PUBLISHED: Kind.CLOSING,
    State.CLOSED: Kind.SETTLED,
    State.LOST: Kind.LOST,
    State.UNFUNDED: Kind.LOST,
}


class Event(Struct, frozen=True, kw_only=True):
    """A message about a channel's life; every kind has all keys, null where it has no value. Amounts in satoshi."""

    version: int = VERSION
    type: str
    channel_id: str
    idempotency_key: str
    sequence: int
    """Sequence number of the channel's record that begins this part of its life."""
    time: UnixTime
    client_pubkey: str
    chan_total_capacity: Sat
    received_sat: Sat
    """All that the channel has paid for; a fee that the client offered at closing is not in it."""
    restored: bool
    reason: str | None = None
    """Why the channel closes or is lost."""
    txid: str | None = None
    """The transaction that ended the channel."""
    fee_sat: Sat | None = None
    """Fee of the settlement; null if another version of it confirmed."""
    client_fee_sat: Sat | None = None
    """Part of the fee that the client offered at closing."""
    settled_channels: int | None = None
    """Number of channels that the settlement settles, and that share its fee."""
    continues_at: str | None = None
    """The output at which the channel goes on after a withdrawal: its `channel_id` from then on."""


def events(before: Channel | None, after: Channel, now: UnixTime) -> list[Event]:
    """Return the messages about a written change, in order; none about a channel that has paid nothing.

    A channel that is stored as closing at once was opened, too.
    """
    kinds = [_KINDS[after.state]]
    if before is None and kinds != [Kind.OPENED]:
        kinds.insert(0, Kind.OPENED)
    if not after.received_sat or (before is not None and _KINDS[before.state] is kinds[-1]):
        return []
    return [_event(kind, after, now) for kind in kinds]


def events_again(restored: Channel, now: UnixTime) -> list[Event]:
    """Return the messages about a channel of a backup, which lacks those that waited in the store.

    None about a channel that has ended and whose expiry has passed: a store holds many of these.
    """
    ended = _KINDS[restored.state] in (Kind.SETTLED, Kind.LOST)
    return [] if ended and restored.terms.expiry.lock_time < now else events(None, restored, now)


def _event(kind: Kind, channel: Channel, now: UnixTime) -> Event:
    closing = channel.closing
    client_fee = closing.client_fee_sat if closing else Sat(0)
    name = sha256(channel.payment.signature_with_flag).hexdigest()[:16]
    event = Event(
        type=kind.value,
        channel_id=str(channel.outpoint),
        idempotency_key=f"{channel.outpoint}:{kind.value}:{channel.seq}:{name}",
        sequence=channel.seq,
        time=now,
        client_pubkey=channel.terms.client_key.hex(),
        chan_total_capacity=channel.funding_sat,
        received_sat=Sat(channel.received_sat - client_fee),
        restored=channel.restored,
    )
    if kind is Kind.OPENED or closing is None:
        return replace(event, reason=_UNFUNDED) if kind is Kind.LOST else event
    if kind is Kind.CLOSING:
        return replace(event, reason=closing.reason.value, client_fee_sat=client_fee)
    if kind is Kind.LOST:
        unfunded = channel.state is State.UNFUNDED
        return replace(event, reason=_UNFUNDED) if unfunded else replace(event, reason=_SPENT, txid=_txid(closing))
    return _settled(event, channel, closing)


def _settled(event: Event, channel: Channel, closing: Closing) -> Event:
    settlement, ended_by = closing.settlement, closing.spent_by
    known = settlement is not None and ended_by in (b"", settlement.txid)
    return replace(
        event,
        reason=closing.reason.value,
        txid=_txid(closing),
        client_fee_sat=closing.client_fee_sat,
        fee_sat=settlement.fee_sat if settlement is not None and known else None,
        settled_channels=len(outpoints_of(settlement.transaction)) if settlement is not None and known else None,
        continues_at=str(OutPoint(ended_by, 0)) if channel.moves and ended_by else None,
    )


def _txid(closing: Closing) -> str | None:
    """Return the txid, as shown, of the transaction that ended the channel."""
    txid = closing.spent_by or (closing.settlement.txid if closing.settlement else b"")
    return txid[::-1].hex() if txid else None
