"""The cashier: from the payment headers of a request to a charge, and from a charge to the headers of the answer.

Both ways to pay, x402 and MPP, end in the same charge. `Cashier.pay` judges in this order: which way, its form, the
offer that it answers, the channel, then payment and credit. A refusal changes nothing. The newest payment is shown to a
caller whose payment the client signed, never to another.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from paychan.gateway.charging import Charged, Charges, shown_state
from paychan.protocol.channel import Channel
from paychan.protocol.charges import Delivery
from paychan.protocol.credit import find_delivery
from paychan.protocol.errors import ChannelClosing, PaychanError, UnknownChannel, ValueBackwards
from paychan.protocol.request_id import content_id, derived_id, idempotency_key, named_id
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.unpaid import CreditTooLow, PaymentUnsupported, TwoPayments
from paychan.protocol.wire import mpp, mpp_outcomes, x402, x402_json, x402_outcomes
from paychan.protocol.wire.offers import Action, ChannelState, Close, Offer, Open, Settled

Way: TypeAlias = Literal["x402", "mpp"]
Fields: TypeAlias = Callable[[str], Sequence[str]]
"""Returns all values of a header, by any case of its name."""

IDEMPOTENCY_HEADER = "Idempotency-Key"
PAYMENT_AUTHORIZATION = "Payment-Authorization"

_WITH_PROOF = (CreditTooLow, ValueBackwards)
"""Refusals after the signature was checked: the payer learns the state of its channel."""


class Asked(Struct, frozen=True):
    """A request as far as its payment depends on it."""

    method: str
    url: str
    """As the client sees it."""
    fields: Fields
    body_sha256: bytes | None
    """None: the body was not read before the payment; then the request is never taken for a repetition."""


class Paper(Struct, frozen=True):
    """The payment that a request brings."""

    way: Way
    action: Action
    name: str | None
    """The payer's own id of the request."""
    challenge_id: str = ""


class Paid(Struct, frozen=True):
    """A request that was charged."""

    paper: Paper
    charged: Charged
    before: Delivery | None = None
    """The request in the record before this charge: a repeated request costs nothing more."""


class Refusal(Struct, frozen=True):
    """A request that was not charged, why, and the payer's channel if the payer may see it."""

    error: PaychanError
    way: Way | None = None
    state: ChannelState | None = None


class Closed(Struct, frozen=True):
    """The payer has closed its channel by this request."""

    channel: Channel


class Cashier:
    """Judges payments of requests. `secrets` sign challenges: the first makes them, all are believed."""

    def __init__(self, charges: Charges, hmac_secrets: Sequence[bytes], clock: Callable[[], UnixTime]) -> None:
        self.charges = charges
        self._secrets = tuple(hmac_secrets)
        self._clock = clock

    async def pay(self, asked: Asked, offer: Offer, total_sat: Sat | None = None) -> Paid | Refusal | Closed:
        """Charge a request to the channel of its payment; `brings_payment` says that it has one.

        The sum is the offer's amount, or `total_sat`: 0 books the payment alone, as credit for an answer under way.
        """
        total_sat = offer.amount_sat if total_sat is None else total_sat
        try:
            paper = self._paper(asked, offer)
        except PaychanError as error:
            return Refusal(error)
        action = paper.action
        if isinstance(action, Open):
            opened = PaymentUnsupported(field="opening in a request", got="open", want=f"a channel of {offer.pay_url}")
            return Refusal(opened, paper.way)
        voucher = action.voucher if isinstance(action, Close) else action
        channel = await self.charges.find(voucher.channel)
        if channel is None:
            return Refusal(UnknownChannel(), paper.way)
        if (wrong := voucher.mismatch(channel.funding_sat)) is not None:
            return Refusal(wrong, paper.way)
        if isinstance(action, Close):
            closed = await self.charges.close(voucher.channel, voucher.payment)
            return Refusal(closed, paper.way) if isinstance(closed, PaychanError) else Closed(closed)
        request = request_id(asked, paper)
        before = find_delivery(channel, request)
        charged = await self.charges.charge(voucher.channel, request, total_sat, voucher.payment)
        if isinstance(charged, PaychanError):
            return await self._refusal(charged, paper)
        return Paid(paper, charged, before)

    async def _refusal(self, error: PaychanError, paper: Paper) -> Refusal:
        action = paper.action
        voucher = action.voucher if isinstance(action, Close | Open) else action
        channel = await self.charges.find(voucher.channel) if isinstance(error, _WITH_PROOF) else None
        return Refusal(error, paper.way, shown_state(channel, proof=True) if channel is not None else None)

    def _paper(self, asked: Asked, offer: Offer) -> Paper:
        """Read the payment, and check that it answers this offer. Raises a `PaychanError`."""
        signed = asked.fields(x402_json.SIGNATURE_HEADER)
        credentials = _credentials(asked.fields)
        if len(signed) + len(credentials) != 1:
            raise TwoPayments(got=len(signed) + len(credentials))
        name = _name(asked.fields)
        if signed:
            payload = x402_json.read_payment(signed[0])
            if (other := x402.mismatch(payload.accepted, offer)) is not None:
                raise other
            return Paper("x402", x402.action_of(payload.payload), x402.identifier_of(payload) or name)
        credential = credentials[0]
        if (problem := mpp.challenge_problem(credential, offer, self._secrets, self._clock())) is not None:
            raise problem
        return Paper("mpp", mpp.action_of(credential.payload), name, credential.challenge.id)

    def success_header(self, paid: Paid, charged: Charged, offer: Offer) -> tuple[str, str]:
        """Return the header with the sum that was charged; `charged` is the newest charge of the request."""
        return outcome_header(paid.paper.way, paid.paper.challenge_id, charged, offer.chain, self._clock())

    def receipt_json(self, paid: Paid, charged: Charged) -> dict[str, Any]:
        """Return the receipt that ends an event stream."""
        settled = Settled(shown_state(charged.channel, proof=False), charged.charged_sat)
        return mpp_outcomes.receipt_json(mpp_outcomes.Receipt(settled, paid.paper.challenge_id, self._clock()))


def outcome_header(way: Way, challenge_id: str, charged: Charged, chain: str, now: UnixTime) -> tuple[str, str]:
    """Return `PAYMENT-RESPONSE` or `Payment-Receipt` for a charge; `challenge_id` is MPP's."""
    state = shown_state(charged.channel, proof=False)
    settled = Settled(state, charged.charged_sat, charged.channel.terms.client_key)
    if way == "x402":
        return x402_json.RESPONSE_HEADER, x402_json.encode_header(x402_outcomes.settled_json(settled, chain))
    receipt = mpp_outcomes.Receipt(settled, challenge_id, now)
    return mpp_outcomes.RECEIPT_HEADER, mpp_outcomes.receipt_header(receipt)


def brings_payment(fields: Fields) -> bool:
    """Say whether a request has a payment header of any way, valid or not."""
    if fields(x402_json.SIGNATURE_HEADER) or fields(PAYMENT_AUTHORIZATION):
        return True
    return any(is_payment(value) for value in fields("Authorization"))


def is_payment(authorization: str) -> bool:
    """Say whether an `Authorization` is a payment of MPP, and no business of the upstream."""
    return authorization.lstrip(" \t").lower().startswith("payment ")


def request_id(asked: Asked, paper: Paper) -> bytes:
    """Return the 16 bytes by which a repeated request is known: the payer's name for it, or its payment; and its content.

    A name for another method, URL or body is another request: it never gets a paid answer for nothing.
    """
    action = paper.action
    voucher = action.voucher if isinstance(action, Close | Open) else action
    if asked.body_sha256 is None:
        return secrets.token_bytes(16)
    if paper.name is not None:
        content = content_id(asked.method, asked.url, asked.body_sha256)
        return named_id(voucher.channel, f"{paper.name} {content.hex()}")
    return derived_id(voucher.channel, voucher.change_sat, asked.method, asked.url, asked.body_sha256)


def status_of(error: PaychanError) -> int:
    """Return the status of a refused payment: 402 with a new offer whenever another payment can help."""
    if error.http_status >= 500 or error.code in ("two_payments", "payment_unsupported", "malformed"):
        return error.http_status
    return 402


def ends_channel(error: PaychanError) -> bool:
    """Say whether the payer needs another channel."""
    return error.http_status in (308, 404, 410) or isinstance(error, ChannelClosing)


def _credentials(fields: Fields) -> list[mpp.Credential]:
    values = [value for value in fields("Authorization") if is_payment(value)]
    values += fields(PAYMENT_AUTHORIZATION)
    found = [mpp.read_credential(value) for value in values]
    if None in found:
        raise PaymentUnsupported(field=PAYMENT_AUTHORIZATION, got="another scheme", want="Payment")
    return [each for each in found if each is not None]


def _name(fields: Fields) -> str | None:
    values = fields(IDEMPOTENCY_HEADER)
    return idempotency_key(values[0]) if values else None
