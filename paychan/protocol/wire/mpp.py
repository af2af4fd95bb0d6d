"""MPP, the HTTP authentication scheme `Payment`: method `bitcoin`, intent `session`.

`bindings/mpp.md` is the page of the method. The server writes challenges, receipts and problems and reads credentials;
a payer's program does the reverse. A challenge is signed by an HMAC, so that the server keeps none of them.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from msgspec import Struct

from paychan.protocol.errors import PaychanError
from paychan.protocol.types import UnixTime
from paychan.protocol.unpaid import (
    ChallengeExpired,
    InvalidChallenge,
    MalformedPayment,
    OfferMismatch,
    PaymentUnsupported,
)
from paychan.protocol.wire.canonical import (
    canonical_json,
    from_base64url,
    json_object,
    read_time,
    time_text,
    to_base64url,
)
from paychan.protocol.wire.challenge_header import quoted, read_challenges
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
from paychan.protocol.wire.mpp_outcomes import read_snapshot, snapshot_json
from paychan.protocol.wire.offers import (
    BINDING,
    CHAINS,
    UNITS,
    Action,
    ChannelState,
    Close,
    Offer,
    Open,
    Voucher,
)

SCHEME, METHOD, INTENT = "Payment", "bitcoin", "session"
CURRENCY = "sat"
LIFETIME_SECONDS = 300
"""Usual lifetime of a challenge, which the SDKs of MPP have, too."""
MAX_CREDENTIAL_BYTES = 24_576
"""Longest credential read: it holds a challenge and a payment with a funding transaction of 4 kB."""
MAX_REQUEST_BYTES = 16_384
"""Longest `request` and `opaque` of a challenge; mppx has the same limit."""

_PARAMETERS = ("id", "realm", "method", "intent", "request", "expires", "digest", "description", "header", "opaque")
_REQUIRED = _PARAMETERS[:5]


class Challenge(Struct, frozen=True, omit_defaults=True):
    """A challenge as it stands in `WWW-Authenticate` and comes back in a credential; `request` is base64url."""

    id: str
    realm: str
    method: str
    intent: str
    request: str
    expires: str | None = None
    digest: str | None = None
    description: str | None = None
    header: str | None = None
    opaque: str | None = None


class Credential(Struct, frozen=True):
    """A payment with its challenge."""

    challenge: Challenge
    payload: dict[str, Any]
    source: str | None = None


class Found(Struct, frozen=True):
    """An offer that a payer's program found in a 402, and the challenge that its payment sends back unchanged."""

    offer: Offer
    challenge: Challenge
    state: ChannelState | None = None
    """The channel as the server has it, if the 402 names one."""


# --- challenges -------------------------------------------------------------------------------------------------------


def request_json(offer: Offer, state: ChannelState | None = None) -> dict[str, Any]:
    """Write the request of an offer; with `state` it names a channel and its newest payment."""
    details: dict[str, Any] = {
        "network": offer.network,
        "chain": offer.chain,
        "payUrl": offer.pay_url,
        "binding": BINDING,
        "minConfirmations": offer.min_confirmations,
        "minDeposit": str(offer.open_price_sat),
        "settlementPeriodSeconds": offer.settlement_period_seconds,
        "dustLimit": str(offer.dust_sat),
    }
    if state is not None:
        details |= {"channelId": str(state.channel), "sessionSnapshot": snapshot_json(state)}
    request: dict[str, Any] = {
        "amount": str(offer.amount_sat),
        "currency": CURRENCY,
        "recipient": offer.identity.hex(),
        "unitType": offer.unit,
        "methodDetails": details,
    }
    if offer.suggested_deposit_sat is not None:
        request["suggestedDeposit"] = str(offer.suggested_deposit_sat)
    return request


def challenge(
    offer: Offer,
    secret: bytes,
    expires: UnixTime,
    *,
    state: ChannelState | None = None,
    digest: str | None = None,
    header: str | None = None,
) -> Challenge:
    """Make the challenge of an offer, which holds until `expires`.

    `digest` binds it to a body (RFC 9530); `header` names the field in which the credential must come, if it is not
    `Authorization`.
    """
    request = to_base64url(canonical_json(request_json(offer, state)))
    unsigned = Challenge(
        "", offer.realm, METHOD, INTENT, request, time_text(expires), digest, offer.description or None, header
    )
    return Challenge(challenge_id(unsigned, secret), *(getattr(unsigned, name) for name in _PARAMETERS[1:]))


def challenge_id(unsigned: Challenge, secret: bytes) -> str:
    """Return the keyed hash of a challenge as the SDKs of MPP make it; the description is not part of it."""
    bound = [
        unsigned.realm,
        unsigned.method,
        unsigned.intent,
        unsigned.request,
        unsigned.expires or "",
        unsigned.digest or "",
    ]
    bound += [unsigned.header] if unsigned.header else []
    bound.append(unsigned.opaque or "")
    return to_base64url(hmac.digest(secret, "|".join(bound).encode(), sha256))


def challenge_header(shown: Challenge) -> str:
    """Write one `WWW-Authenticate` field."""
    values = ((name, getattr(shown, name)) for name in _PARAMETERS)
    return f"{SCHEME} " + ", ".join(f"{name}={quoted(value)}" for name, value in values if value is not None)


def challenges(values: Iterable[str]) -> list[Challenge]:
    """Read the challenges of the scheme `Payment` from all `WWW-Authenticate` fields, in their order.

    Other schemes, and challenges without one of the required parameters, are left out.

    Raises:
        PaymentTooLarge, MalformedPayment: the fields as a whole can't be read.
    """
    return [
        Challenge(**{name: found[name] for name in _PARAMETERS if name in found})
        for scheme, found in read_challenges(values)
        if scheme == SCHEME.lower() and all(found.get(name) for name in _REQUIRED)
    ]


def offer_of(shown: Challenge) -> Offer:
    """Read the offer of a challenge.

    Raises:
        PaymentUnsupported: another method, intent, binding, currency, chain or unit.
        PaymentTooLarge, MalformedPayment: a member is missing or has another form.
    """
    request = _request(shown)
    details = request.get("methodDetails")
    details = details if isinstance(details, dict) else {}
    chain, unit = read_text(details, "chain", 80), request.get("unitType", "request")
    for name, got, want in (
        ("method", shown.method, METHOD),
        ("intent", shown.intent, INTENT),
        ("binding", details.get("binding"), BINDING),
        ("currency", request.get("currency"), CURRENCY),
        ("chain", chain, CHAINS.get(read_text(details, "network", 40))),
    ):
        if got != want:
            raise PaymentUnsupported(field=name, got=str(got)[:80], want=str(want))
    if unit not in UNITS:
        raise PaymentUnsupported(field="unitType", got=str(unit)[:80], want="one of " + ", ".join(UNITS))
    deposit = request.get("suggestedDeposit")
    return Offer(
        amount_sat=read_sat(request.get("amount"), "amount"),
        unit=unit,
        chain=chain,
        identity=read_key(request.get("recipient"), "recipient"),
        pay_url=read_text(details, "payUrl", 2048),
        network=details["network"],
        open_price_sat=read_sat(details.get("minDeposit"), "minDeposit"),
        min_confirmations=read_count(details, "minConfirmations"),
        settlement_period_seconds=read_count(details, "settlementPeriodSeconds"),
        dust_sat=read_sat(details.get("dustLimit"), "dustLimit"),
        realm=shown.realm,
        description=shown.description or "",
        suggested_deposit_sat=None if deposit is None else read_sat(deposit, "suggestedDeposit"),
    )


def offers(values: Iterable[str]) -> list[Found]:
    """Return the offers in all `WWW-Authenticate` fields that this method can pay, in the server's order.

    Raises:
        PaymentTooLarge, MalformedPayment: the fields as a whole can't be read.
    """
    found = []
    for shown in challenges(values):
        try:
            found.append(Found(offer_of(shown), shown, read_snapshot(_request(shown))))
        except PaychanError:
            continue
    return found


def _request(shown: Challenge) -> dict[str, Any]:
    return json_object(from_base64url(shown.request, "request", MAX_REQUEST_BYTES), "request")


# --- credentials ------------------------------------------------------------------------------------------------------


def payload_of(action: Action) -> dict[str, Any]:
    """Write a payment, an opening or a close as the member `payload`."""
    voucher = action if isinstance(action, Voucher) else action.voucher
    return {
        "action": "open" if isinstance(action, Open) else "close" if isinstance(action, Close) else "voucher",
        "channelId": str(voucher.channel),
        "cumulativeAmount": str(voucher.cumulative_sat),
        **proof_json(voucher.payment),
        **({"type": "transaction", **opening_json(action)} if isinstance(action, Open) else {}),
    }


def action_of(payload: Mapping[str, Any]) -> Action:
    """Read the member `payload`; members with other names are ignored.

    Raises:
        PaymentUnsupported: another action; `topUp` needs a channel with several funding outputs.
        MalformedPayment: a member is missing or has another form.
    """
    kind = payload.get("action")
    if kind not in ("open", "voucher", "close"):
        raise PaymentUnsupported(field="action", got=str(kind)[:80], want="open, voucher or close; open a new channel")
    voucher = read_voucher(payload, "channelId", "cumulativeAmount")
    if kind == "open":
        return read_opening(payload, voucher)
    return Close(voucher) if kind == "close" else voucher


def credential_header(shown: Challenge, action: Action, source: str | None = None) -> str:
    """Write `Authorization`, or the field that the challenge names: the payer's answer to a challenge."""
    echo = {name: value for name in _PARAMETERS if (value := getattr(shown, name)) is not None}
    content: dict[str, Any] = {"challenge": echo, "payload": payload_of(action)}
    if source is not None:
        content["source"] = source
    return f"{SCHEME} {to_base64url(canonical_json(content))}"


def read_credential(header: str) -> Credential | None:
    """Read `Authorization` or `Payment-Authorization`; None if it has another scheme.

    Raises:
        PaymentTooLarge, MalformedPayment: the scheme is `Payment`, but its value can't be read.
    """
    scheme, _, text = header.strip(" \t").partition(" ")
    if scheme.lower() != SCHEME.lower():
        return None
    value = json_object(from_base64url(text.strip(" \t"), "credential", MAX_CREDENTIAL_BYTES), "credential")
    echo, payload, source = value.get("challenge"), value.get("payload"), value.get("source")
    if not isinstance(echo, dict) or not isinstance(payload, dict) or not isinstance(source, str | None):
        raise MalformedPayment(field="credential", reason="want challenge and payload as objects, source as a text")
    known = {name: echo[name] for name in _PARAMETERS if echo.get(name) is not None}
    for name in _REQUIRED:
        read_text(known, name, MAX_REQUEST_BYTES)
    if not all(isinstance(item, str) for item in known.values()):
        raise MalformedPayment(field="challenge", reason="want texts")
    return Credential(Challenge(**known), payload, source)


def challenge_problem(
    credential: Credential, offer: Offer, secrets: Sequence[bytes], now: UnixTime, digest: str | None = None
) -> PaychanError | None:
    """Return why a credential's challenge does not hold for this offer now, or None.

    In this order: an HMAC by one of `secrets` (new and old), the terms of the offer, the expiry, and the digest of the
    request's body if the challenge has one.
    """
    shown = credential.challenge
    bound = (
        shown.realm,
        shown.method,
        shown.intent,
        shown.request,
        shown.expires,
        shown.digest,
        shown.header,
        shown.opaque,
    )
    if any("|" in text for text in bound if text) or not _is_signed(shown, secrets):
        return InvalidChallenge()
    if (other := _difference(shown, offer)) is not None:
        return other
    try:
        limit = read_time(shown.expires or "", "expires")
    except MalformedPayment as error:
        return error
    if now > limit:
        return ChallengeExpired(now_unix=now, limit_unix=limit)
    if shown.digest is not None and not hmac.compare_digest(shown.digest.encode(), (digest or "").encode()):
        return OfferMismatch(field="digest", got=shown.digest[:80], want=digest or "none")
    return None


def _is_signed(shown: Challenge, secrets: Sequence[bytes]) -> bool:
    """Compare with the HMAC of every secret, in a time that does not depend on the bytes."""
    got, signed = shown.id.encode(), False
    for secret in secrets:
        signed |= hmac.compare_digest(got, challenge_id(shown, secret).encode())
    return signed


def _difference(shown: Challenge, offer: Offer) -> OfferMismatch | None:
    for name, got, want in (
        ("realm", shown.realm, offer.realm),
        ("method", shown.method, METHOD),
        ("intent", shown.intent, INTENT),
    ):
        if got != want:
            return OfferMismatch(field=name, got=got[:80], want=want)
    got_request, request = _request(shown), request_json(offer)
    details = got_request.pop("methodDetails", None)
    for prefix, got_part, part in (
        ("methodDetails.", details if isinstance(details, dict) else {}, request.pop("methodDetails")),
        ("", got_request, request),
    ):
        for name, want in part.items():
            if got_part.get(name) != want:
                return OfferMismatch(field=prefix + name, got=str(got_part.get(name))[:80], want=str(want))
    return None
