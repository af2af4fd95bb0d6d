"""x402 version 2: the binding `bitcoin-channel-v1` of the scheme `batch-settlement`.

`bindings/x402.md` is the page of the binding. The server writes `PaymentRequired` and `SettleResponse` and reads
`PaymentPayload`; a payer's program does the reverse. Types and headers: `x402_json.py`; outcomes: `x402_outcomes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from msgspec import Struct

from paychan.protocol.errors import PaychanError
from paychan.protocol.request_id import payment_identifier
from paychan.protocol.unpaid import MalformedPayment, OfferMismatch, PaymentUnsupported
from paychan.protocol.wire.members import (
    opening_json,
    proof_json,
    read_count,
    read_key,
    read_opening,
    read_sat,
    read_text,
    read_voucher,
)
from paychan.protocol.wire.offers import (
    BINDING,
    UNITS,
    Action,
    ChannelState,
    Close,
    Offer,
    Open,
    Voucher,
    asset_of,
    word_of,
)
from paychan.protocol.wire.x402_json import (
    VERSION,
    PaymentPayload,
    PaymentRequired,
    Requirements,
    Resource,
    encode_header,
)
from paychan.protocol.wire.x402_outcomes import correction_json, error_code, read_state

SCHEME = "batch-settlement"
TRANSFER_METHOD = "bitcoin-channel"
MAX_TIMEOUT_SECONDS = 60
"""Time from the offer to the payment that the offer promises; the server does not measure it."""
IDENTIFIER = "payment-identifier"
"""Extension by which a payer names its request."""


class Found(Struct, frozen=True):
    """An offer that a payer's program found in a 402, and the object that its payment sends back unchanged."""

    offer: Offer
    accepted: Requirements
    state: ChannelState | None = None
    """The channel as the server has it, if the 402 corrects a payment."""


# --- offers -----------------------------------------------------------------------------------------------------------


def requirements(offer: Offer, state: ChannelState | None = None) -> Requirements:
    """Write an offer; with `state` it corrects the payer's view of a channel."""
    extra: dict[str, Any] = {
        "assetTransferMethod": TRANSFER_METHOD,
        "binding": BINDING,
        "payUrl": offer.pay_url,
        "openPriceSat": str(offer.open_price_sat),
        "minConfirmations": offer.min_confirmations,
        "settlementPeriodSeconds": offer.settlement_period_seconds,
        "dustLimitSat": str(offer.dust_sat),
    }
    if offer.unit != "request":
        extra["unit"] = offer.unit
    if offer.suggested_deposit_sat is not None:
        extra["suggestedDepositSat"] = str(offer.suggested_deposit_sat)
    if state is not None:
        extra.update(correction_json(state))
    return Requirements(
        scheme=SCHEME,
        network=offer.chain,
        amount=str(offer.amount_sat),
        asset=asset_of(offer.chain),
        pay_to=offer.identity.hex(),
        max_timeout_seconds=MAX_TIMEOUT_SECONDS,
        extra=extra,
    )


def payment_required(
    offer: Offer,
    url: str,
    *,
    mime_type: str | None = None,
    error: PaychanError | None = None,
    state: ChannelState | None = None,
    others: list[Requirements] | None = None,
) -> PaymentRequired:
    """Write a 402 for `url`: the offer, ways to pay by `others`, and why a payment was refused."""
    return PaymentRequired(
        x402_version=VERSION,
        error="Payment required" if error is None else error_code(error),
        resource=Resource(
            url=url,
            description=offer.description or None,
            mime_type=mime_type,
            service_name=offer.realm[:32] or None,
        ),
        accepts=[requirements(offer, state), *(others or [])],
        extensions={
            IDENTIFIER: {
                "info": {"required": False},
                "schema": {
                    "type": "object",
                    "properties": {
                        "required": {"type": "boolean"},
                        "id": {"type": "string", "minLength": 16, "maxLength": 128, "pattern": "^[a-zA-Z0-9_-]+$"},
                    },
                },
            }
        },
    )


def is_this_binding(way: Requirements) -> bool:
    """Say whether a way to pay is that of this page: another binding may have the same scheme and network."""
    return (way.scheme, way.extra.get("assetTransferMethod"), way.extra.get("binding")) == (
        SCHEME,
        TRANSFER_METHOD,
        BINDING,
    )


def offer_of(way: Requirements, resource: Resource | None = None) -> Offer:
    """Read an offer.

    Raises:
        PaymentUnsupported: another binding, chain or unit.
        MalformedPayment: a member has another form, or the asset is not the coin of the chain.
    """
    extra = way.extra
    if not is_this_binding(way):
        raise PaymentUnsupported(field="binding", got=str(extra.get("binding"))[:80], want=BINDING)
    network, unit = word_of(way.network), extra.get("unit", "request")
    if way.asset != asset_of(way.network):
        raise MalformedPayment(field="asset", reason=f"want {asset_of(way.network)}")
    if unit not in UNITS:
        raise PaymentUnsupported(field="unit", got=str(unit)[:80], want="one of " + ", ".join(UNITS))
    deposit = extra.get("suggestedDepositSat")
    return Offer(
        amount_sat=read_sat(way.amount, "amount"),
        unit=unit,
        chain=way.network,
        identity=read_key(way.pay_to, "payTo"),
        pay_url=read_text(extra, "payUrl", 2048),
        network=network,
        open_price_sat=read_sat(extra.get("openPriceSat"), "openPriceSat"),
        min_confirmations=read_count(extra, "minConfirmations"),
        settlement_period_seconds=read_count(extra, "settlementPeriodSeconds"),
        dust_sat=read_sat(extra.get("dustLimitSat"), "dustLimitSat"),
        realm=(resource.service_name if resource else None) or "",
        description=(resource.description if resource else None) or "",
        suggested_deposit_sat=None if deposit is None else read_sat(deposit, "suggestedDepositSat"),
    )


def offers(required: PaymentRequired) -> list[Found]:
    """Return the offers of a 402 that this binding can pay, in the server's order; the others are left out."""
    found = []
    for way in required.accepts:
        try:
            found.append(Found(offer_of(way, required.resource), way, read_state(way.extra)))
        except PaychanError:
            continue
    return found


@lru_cache(1000)
def _static(offer: Offer) -> Requirements:
    """Return the requirements of an offer; those of a price list are made once."""
    return requirements(offer)


def mismatch(accepted: Requirements, offer: Offer) -> OfferMismatch | None:
    """Return a refusal if a payment chose another offer than this one: x402's rule of both SDKs' servers.

    The terms are equal, and `extra` has each member of the offer's; it may have more.
    """
    own = _static(offer)
    for name in ("scheme", "network", "amount", "asset", "pay_to", "max_timeout_seconds"):
        got, want = getattr(accepted, name), getattr(own, name)
        if got != want:
            return OfferMismatch(field=name, got=str(got)[:80], want=str(want))
    for name, want in own.extra.items():
        got = accepted.extra.get(name)
        if got != want or isinstance(got, bool) is not isinstance(want, bool):
            return OfferMismatch(field=f"extra.{name}", got=str(got)[:80], want=str(want))
    return None


# --- payments ---------------------------------------------------------------------------------------------------------


def payload_of(action: Action) -> dict[str, Any]:
    """Write a payment, an opening or a close as the member `payload`."""
    voucher = action if isinstance(action, Voucher) else action.voucher
    return {
        "type": "open" if isinstance(action, Open) else "close" if isinstance(action, Close) else "payment",
        "channel": str(voucher.channel),
        "cumulativeSat": str(voucher.cumulative_sat),
        **proof_json(voucher.payment),
        **(opening_json(action) if isinstance(action, Open) else {}),
    }


def action_of(payload: Mapping[str, Any]) -> Action:
    """Read the member `payload`; members with other names are ignored.

    Raises:
        PaymentUnsupported: another `type`.
        MalformedPayment: a member is missing or has another form.
    """
    kind = payload.get("type")
    if kind not in ("payment", "open", "close"):
        raise PaymentUnsupported(field="type", got=str(kind)[:80], want="payment, open or close")
    voucher = read_voucher(payload, "channel", "cumulativeSat")
    if kind == "open":
        return read_opening(payload, voucher)
    return Close(voucher) if kind == "close" else voucher


def payment_header(found: Found, action: Action, resource: Resource | None = None, identifier: str = "") -> str:
    """Write `PAYMENT-SIGNATURE`: the payer's answer to an offer. `identifier` names the request (`IDENTIFIER`)."""
    extensions = {IDENTIFIER: {"info": {"required": False, "id": identifier}}} if identifier else None
    return encode_header(
        PaymentPayload(
            x402_version=VERSION,
            resource=resource,
            accepted=found.accepted,
            payload=payload_of(action),
            extensions=extensions,
        )
    )


def identifier_of(payload: PaymentPayload) -> str | None:
    """Return the name that the payer gave to its request, if any.

    Raises:
        Malformed: not 16 to 128 letters, digits, `_` or `-`.
    """
    extension = (payload.extensions or {}).get(IDENTIFIER)
    info = extension.get("info") if isinstance(extension, dict) else None
    name = info.get("id") if isinstance(info, dict) else None
    return None if name is None else payment_identifier(name if isinstance(name, str) else "")
