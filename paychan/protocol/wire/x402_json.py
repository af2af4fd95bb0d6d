"""JSON of x402 version 2 and its headers, for any scheme. A header is standard base64 with padding of an object."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from paychan.protocol.unpaid import MalformedPayment, PaymentUnsupported
from paychan.protocol.wire.canonical import from_base64, json_object, to_base64

VERSION = 2
MAX_HEADER_BYTES = 16_384
"""Longest value read: a payment with a funding transaction of 4 kB and the offer that comes back fits."""

REQUIRED_HEADER, SIGNATURE_HEADER, RESPONSE_HEADER = "PAYMENT-REQUIRED", "PAYMENT-SIGNATURE", "PAYMENT-RESPONSE"

_T = TypeVar("_T")


class _Json(Struct, frozen=True, rename="camel", omit_defaults=True):
    """A JSON object with names in camel case, without members that are absent."""


class Resource(_Json, frozen=True):
    """The resource that has a price."""

    url: str
    description: str | None = None
    mime_type: str | None = None
    service_name: str | None = None
    tags: list[str] | None = None
    icon_url: str | None = None


class Requirements(_Json, frozen=True):
    """One way to pay: `amount` is in the smallest unit of the asset, here satoshi."""

    scheme: str
    network: str
    amount: str
    asset: str
    pay_to: str
    max_timeout_seconds: int
    extra: dict[str, Any] = field(default_factory=dict)


class PaymentRequired(_Json, frozen=True):
    """Content of a 402."""

    x402_version: int
    accepts: list[Requirements]
    resource: Resource | None = None
    error: str | None = None
    extensions: dict[str, Any] | None = None


class PaymentPayload(_Json, frozen=True):
    """A payment, with the chosen one of the ways to pay."""

    x402_version: int
    accepted: Requirements
    payload: dict[str, Any]
    resource: Resource | None = None
    extensions: dict[str, Any] | None = None


class SettleResponse(_Json, frozen=True):
    """Outcome of a payment."""

    success: bool
    transaction: str
    network: str
    error_reason: str | None = None
    error_message: str | None = None
    payer: str | None = None
    amount: str | None = None
    extensions: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None


class VerifyResponse(_Json, frozen=True):
    """Answer of a facilitator's `/verify`."""

    is_valid: bool
    invalid_reason: str | None = None
    invalid_message: str | None = None
    payer: str | None = None
    extra: dict[str, Any] | None = None


class SupportedKind(_Json, frozen=True):
    """A scheme on a network that a facilitator settles."""

    x402_version: int
    scheme: str
    network: str
    extra: dict[str, Any] | None = None


class SupportedResponse(Struct, frozen=True):
    """Answer of a facilitator's `/supported`; `signers` has the keys of each family of networks."""

    kinds: list[SupportedKind]
    extensions: list[str]
    signers: dict[str, list[str]]


# --- headers ----------------------------------------------------------------------------------------------------------


def encode_header(value: Struct) -> str:
    """Write the value of a header."""
    return to_base64(msgspec.json.encode(value))


def payment_of(value: Any) -> PaymentPayload:
    """Read a payment as a JSON object, which MCP and a facilitator's callers send in place of a header.

    Raises:
        MalformedPayment, PaymentUnsupported: another form or version.
    """
    return _convert(_versioned(value, "payment"), PaymentPayload, "payment")


def requirements_of(value: Any) -> Requirements:
    """Read one way to pay as a JSON object.

    Raises:
        MalformedPayment: another form.
    """
    return _convert(value, Requirements, "paymentRequirements")


def _object(text: str, name: str) -> dict[str, Any]:
    return _versioned(json_object(from_base64(text.strip(" \t"), name, MAX_HEADER_BYTES), name), name)


def _versioned(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedPayment(field=name, reason="not a JSON object")
    version = value.get("x402Version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise PaymentUnsupported(field="x402Version", got=str(version)[:20], want=str(VERSION))
    return value


def _convert(value: Any, kind: type[_T], name: str) -> _T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise MalformedPayment(field=name, reason=str(error)) from None


def read_payment(header: str) -> PaymentPayload:
    """Read `PAYMENT-SIGNATURE`.

    Raises:
        PaymentTooLarge, MalformedPayment, PaymentUnsupported: too long, not the JSON, another version.
    """
    return _convert(_object(header, SIGNATURE_HEADER), PaymentPayload, SIGNATURE_HEADER)


def read_response(header: str) -> SettleResponse:
    """Read `PAYMENT-RESPONSE`.

    Raises:
        PaymentTooLarge, MalformedPayment: too long, not the JSON.
    """
    return _convert(_object(header, RESPONSE_HEADER), SettleResponse, RESPONSE_HEADER)


def read_required(header: str) -> PaymentRequired:
    """Read `PAYMENT-REQUIRED`; ways to pay that have another form than `Requirements` are left out.

    Raises:
        PaymentTooLarge, MalformedPayment, PaymentUnsupported: too long, not the JSON, another version.
    """
    value = _object(header, REQUIRED_HEADER)
    ways = value.get("accepts")
    if not isinstance(ways, list):
        raise MalformedPayment(field=REQUIRED_HEADER, reason="accepts is no array")
    readable = []
    for way in ways:
        try:
            readable.append(msgspec.convert(way, Requirements))
        except msgspec.ValidationError:
            continue
    return _convert({**value, "accepts": readable}, PaymentRequired, REQUIRED_HEADER)
