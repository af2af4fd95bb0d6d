"""MPP, the HTTP authentication scheme `Payment`: method `bitcoin`, intent `session`.

`bindings/mpp.md` is the page of the method. The server writes challenges, receipts and problems and reads credentials;
a payer's program does the reverse. A challenge is signed by an HMAC, so that the server keeps none of them.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct

from paychan.protocol.errors import PaychanError
from paychan.protocol.types import UnixTime
from paychan.protocol.unpaid import (
    ChallengeExpired,
    InvalidChallenge,
    MalformedPayment,
    OfferMismatch,
    PaymentTooLarge,
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
from paychan.protocol.wire.mpp_challenge import (
    MAX_REQUEST_BYTES,
    OBJECTS,
    PARAMETERS,
    REQUIRED,
    SCHEME,
    Challenge,
    challenge_id,
    challenges,
    request_of,
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

METHOD, INTENT = "bitcoin", "session"
CURRENCY = "sat"
LIFETIME_SECONDS = 300
"""Usual lifetime of a challenge, which the SDKs of MPP have, too."""
MAX_CREDENTIAL_BYTES = 24_576
"""Longest credential read: it holds a challenge and a payment with a funding transaction of 4 kB."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


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


def check_realm(realm: str) -> str:
    """Return a realm that a challenge can have; settings are checked by it.

    Raises:
        ValueError: empty, with a control character, or with a bar, which joins the members under the keyed hash.
    """
    if not realm or "|" in realm or _CONTROL.search(realm):
        msg = f"realm {realm!r} is empty, or has a control character or a bar"
        raise ValueError(msg)
    return realm


@lru_cache(1000)
def _request_text(offer: Offer) -> str:
    """Return the request of an offer as its challenges have it; those of a price list are written once."""
    return to_base64url(canonical_json(request_json(offer)))


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

    Raises:
        ValueError: a realm that no challenge can have, see `check_realm`.
    """
    check_realm(offer.realm)
    request = _request_text(offer) if state is None else to_base64url(canonical_json(request_json(offer, state)))
    unsigned = Challenge(
        "",
        offer.realm,
        METHOD,
        INTENT,
        request,
        time_text(expires),
        digest,
        _CONTROL.sub(" ", offer.description) or None,
        header,
    )
    return Challenge(challenge_id(unsigned, secret), *(getattr(unsigned, name) for name in PARAMETERS[1:]))


def offer_of(shown: Challenge) -> Offer:
    """Read the offer of a challenge.

    Raises:
        PaymentUnsupported: another method, intent, binding, currency, chain or unit.
        PaymentTooLarge, MalformedPayment: a member is missing or has another form.
    """
    request = request_of(shown)
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
            found.append(Found(offer_of(shown), shown, read_snapshot(request_of(shown))))
        except PaychanError:
            continue
    return found


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
    echo = {name: value for name in PARAMETERS if (value := getattr(shown, name)) is not None}
    content: dict[str, Any] = {"challenge": echo, "payload": payload_of(action)}
    if source is not None:
        content["source"] = source
    return f"{SCHEME} {to_base64url(msgspec.json.encode(content))}"


def read_credential(header: str) -> Credential | None:
    """Read `Authorization` or `Payment-Authorization`; None if it has another scheme.

    Raises:
        PaymentTooLarge, MalformedPayment: the scheme is `Payment`, but its value can't be read.
    """
    scheme, _, text = header.strip(" \t").partition(" ")
    if scheme.lower() != SCHEME.lower():
        return None
    return credential_of(
        json_object(from_base64url(text.strip(" \t"), "credential", MAX_CREDENTIAL_BYTES), "credential")
    )


def credential_of(value: Mapping[str, Any]) -> Credential:
    """Read a credential as a JSON object; in JSON-RPC its challenge has `request` and `opaque` as objects, too.

    Raises:
        MalformedPayment: a member is missing or has another form.
    """
    echo, payload, source = value.get("challenge"), value.get("payload"), value.get("source")
    if not isinstance(echo, dict) or not isinstance(payload, dict) or not isinstance(source, str | None):
        raise MalformedPayment(field="credential", reason="want challenge and payload as objects, source as a text")
    known = {name: item for name in PARAMETERS if (item := echo.get(name)) is not None}
    for name in OBJECTS:
        if isinstance(known.get(name), dict):
            try:
                known[name] = to_base64url(canonical_json(known[name]))
            except ValueError as error:
                raise MalformedPayment(field=name, reason=str(error)) from None
    for name in REQUIRED:
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
    try:
        if (other := _difference(shown, offer)) is not None:
            return other
        limit = read_time(shown.expires or "", "expires")
    except (MalformedPayment, PaymentTooLarge) as error:
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
    if shown.request == _request_text(offer):
        return None
    got_request, request = request_of(shown), request_json(offer)
    details = got_request.pop("methodDetails", None)
    for prefix, got_part, part in (
        ("methodDetails.", details if isinstance(details, dict) else {}, request.pop("methodDetails")),
        ("", got_request, request),
    ):
        for name, want in part.items():
            if got_part.get(name) != want:
                return OfferMismatch(field=prefix + name, got=str(got_part.get(name))[:80], want=str(want))
    return None
