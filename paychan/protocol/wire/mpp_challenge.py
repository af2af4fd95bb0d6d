"""Challenges of MPP, for any method: their keyed hash, and their form in `WWW-Authenticate` and in JSON-RPC."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from paychan.protocol.wire.canonical import from_base64url, json_object, to_base64url
from paychan.protocol.wire.challenge_header import quoted, read_challenges

SCHEME = "Payment"
MAX_REQUEST_BYTES = 16_384
"""Longest `request` and `opaque` of a challenge; mppx has the same limit."""

PARAMETERS = ("id", "realm", "method", "intent", "request", "expires", "digest", "description", "header", "opaque")
REQUIRED, OBJECTS = PARAMETERS[:5], ("request", "opaque")


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
    return to_base64url(hmac.digest(secret, "|".join(bound).encode(), "sha256"))


def challenge_header(shown: Challenge) -> str:
    """Write one `WWW-Authenticate` field."""
    values = ((name, getattr(shown, name)) for name in PARAMETERS)
    return f"{SCHEME} " + ", ".join(f"{name}={quoted(value)}" for name, value in values if value is not None)


def challenge_json(shown: Challenge) -> dict[str, Any]:
    """Write a challenge for JSON-RPC and MCP: `request` is an object."""
    return {**msgspec.to_builtins(shown), "request": request_of(shown)}


def challenges(values: Iterable[str]) -> list[Challenge]:
    """Read the challenges of the scheme `Payment` from all `WWW-Authenticate` fields, in their order.

    Other schemes, and challenges without one of the required parameters, are left out.

    Raises:
        PaymentTooLarge, MalformedPayment: the fields as a whole can't be read.
    """
    return [
        Challenge(**{name: found[name] for name in PARAMETERS if name in found})
        for scheme, found in read_challenges(values)
        if scheme == SCHEME.lower() and all(found.get(name) for name in REQUIRED)
    ]


def request_of(shown: Challenge) -> dict[str, Any]:
    """Read the request of a challenge.

    Raises:
        PaymentTooLarge, MalformedPayment: too long, or not base64url of a JSON object.
    """
    return json_object(from_base64url(shown.request, "request", MAX_REQUEST_BYTES), "request")
