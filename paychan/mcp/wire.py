"""Payments in `_meta`, results and errors of MCP, translated from and to the headers of HTTP. It is pure.

x402 (transport MCP of version 2): an unpaid call gets a result with `isError` and the `PaymentRequired` as `structuredContent`.
MPP (draft-payment-transport-mcp): an unpaid call gets the JSON-RPC error -32042, a refused payment -32043. In both, a payment
and its receipt are JSON objects in `_meta`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias
from urllib.parse import quote

import msgspec

from paychan.protocol.errors import PaychanError
from paychan.protocol.unpaid import MalformedPayment
from paychan.protocol.wire import mpp, x402_json
from paychan.protocol.wire.canonical import canonical_json, from_base64url, json_object, to_base64, to_base64url
from paychan.protocol.wire.challenge_header import FIELD
from paychan.protocol.wire.mpp_challenge import (
    MAX_REQUEST_BYTES,
    OBJECTS,
    PARAMETERS,
    REQUIRED,
    SCHEME,
    Challenge,
    challenge_header,
    challenge_json,
    challenges,
)
from paychan.protocol.wire.mpp_outcomes import MAX_RECEIPT_BYTES, RECEIPT_HEADER

Headers: TypeAlias = tuple[tuple[str, str], ...]
"""Names in lower case."""

X402_PAYMENT, X402_RESPONSE = "x402/payment", "x402/payment-response"
MPP_CREDENTIAL, MPP_RECEIPT = "org.paymentauth/credential", "org.paymentauth/receipt"
MPP_REQUIRED = "org.paymentauth/payment-required"
"""Challenges beside an x402 result, for payers of MPP."""

PAYMENT_REQUIRED, VERIFICATION_FAILED, INVALID_PARAMS, INTERNAL_ERROR = -32042, -32043, -32602, -32603
CAPABILITY = {"payment": {"methods": {mpp.METHOD: {"intents": [mpp.INTENT]}}}}
"""Experimental capability of a server that sells tools."""

_REQUIRED, _RESPONSE = x402_json.REQUIRED_HEADER.lower(), x402_json.RESPONSE_HEADER.lower()
_SIGNATURE, _RECEIPT, _CHALLENGE = x402_json.SIGNATURE_HEADER.lower(), RECEIPT_HEADER.lower(), FIELD.lower()


def tool_url(name: str) -> str:
    """Return the URL of a tool in x402."""
    return f"mcp://tool/{quote(name)}"


# --- payments ---------------------------------------------------------------------------------------------------------


def payment_headers(meta: Mapping[str, Any]) -> Headers:
    """Return the payments in the `_meta` of a call as headers.

    Raises:
        MalformedPayment: a credential is missing a member, or has another form.
    """
    found: list[tuple[str, str]] = []
    if (payment := meta.get(X402_PAYMENT)) is not None:
        found.append((_SIGNATURE, _encoded(_object(payment, X402_PAYMENT))))
    if (shown := meta.get(MPP_CREDENTIAL)) is not None:
        credential = mpp.credential_of(_object(shown, MPP_CREDENTIAL))
        found.append(("authorization", f"{SCHEME} {to_base64url(msgspec.json.encode(credential))}"))
    return tuple(found)


def payment_meta(headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the payment in headers as members of `_meta`."""
    meta: dict[str, Any] = {}
    for name, value in headers:
        if name.lower() == _SIGNATURE:
            meta[X402_PAYMENT] = msgspec.to_builtins(x402_json.read_payment(value))
        elif name.lower() in ("authorization", "payment-authorization"):
            credential = mpp.read_credential(value)
            assert credential is not None
            source = {} if credential.source is None else {"source": credential.source}
            shown = {"challenge": _native(credential.challenge), "payload": credential.payload}
            meta[MPP_CREDENTIAL] = shown | source
    return meta


# --- offers -----------------------------------------------------------------------------------------------------------


def required_json(headers: Iterable[tuple[str, str]], tool: str) -> dict[str, Any] | None:
    """Return the `PaymentRequired` of a 402 for a tool; None if it has none."""
    for name, value in headers:
        if name.lower() == _REQUIRED:
            required: dict[str, Any] = msgspec.to_builtins(x402_json.read_required(value))
            return required | {"resource": {**(required.get("resource") or {}), "url": tool_url(tool)}}
    return None


def challenges_json(headers: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the challenges of a 402 as JSON objects."""
    return [_native(each) for each in challenges(value for name, value in headers if name.lower() == _CHALLENGE)]


def offer_headers(required: object, shown: object) -> Headers:
    """Return a `PaymentRequired` and challenges as the headers of a 402; what can't be read is left out."""
    found: list[tuple[str, str]] = []
    if isinstance(required, dict) and isinstance(required.get("accepts"), list):
        found.append((_REQUIRED, _encoded(required)))
    for each in shown if isinstance(shown, list) else ():
        try:
            found.append((_CHALLENGE, challenge_header(_challenge(each))))
        except (PaychanError, ValueError):
            continue
    return tuple(found)


# --- receipts ---------------------------------------------------------------------------------------------------------


def receipt_meta(headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return `PAYMENT-RESPONSE` or `Payment-Receipt` as members of `_meta`."""
    meta: dict[str, Any] = {}
    for name, value in headers:
        if name.lower() == _RESPONSE:
            meta[X402_RESPONSE] = msgspec.to_builtins(x402_json.read_response(value))
        elif name.lower() == _RECEIPT:
            meta[MPP_RECEIPT] = json_object(from_base64url(value, RECEIPT_HEADER, MAX_RECEIPT_BYTES), RECEIPT_HEADER)
    return meta


def receipt_headers(meta: Mapping[str, Any]) -> Headers:
    """Return the receipts in the `_meta` of a result as headers."""
    found: list[tuple[str, str]] = []
    if isinstance(response := meta.get(X402_RESPONSE), dict):
        found.append((_RESPONSE, _encoded(response)))
    if isinstance(receipt := meta.get(MPP_RECEIPT), dict):
        found.append((_RECEIPT, to_base64url(json.dumps(receipt).encode())))
    return tuple(found)


def _encoded(value: Mapping[str, Any]) -> str:
    return to_base64(msgspec.json.encode(value))


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedPayment(field=name, reason="want an object")
    return value


def _challenge(value: object) -> Challenge:
    """Read a challenge whose `request` and `opaque` are objects."""
    known = {name: item for name in PARAMETERS if (item := _object(value, "challenge").get(name)) is not None}
    for name in OBJECTS:
        if isinstance(known.get(name), dict):
            known[name] = to_base64url(canonical_json(known[name]))
    if not all(isinstance(known.get(name, ""), str) for name in PARAMETERS) or not all(map(known.get, REQUIRED)):
        raise MalformedPayment(field="challenge", reason="want texts, and id, realm, method, intent and request")
    return Challenge(**known)


def _native(shown: Challenge) -> dict[str, Any]:
    """Return a challenge as JSON-RPC has it: `request` and `opaque` are objects."""
    native = challenge_json(shown)
    if shown.opaque is not None:
        native["opaque"] = json_object(from_base64url(shown.opaque, "opaque", MAX_REQUEST_BYTES), "opaque")
    return native
