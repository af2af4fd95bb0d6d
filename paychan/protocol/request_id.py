"""The id of a paid request, 16 bytes: a channel charges a request with the same id at most once.

A payer names its request by an id of its own (x402 `payment-identifier`, or `Idempotency-Key`). Without one, the id
follows from the payment and the request, so that a repeated request with the same payment is the same request.
"""

from __future__ import annotations

import re
from hashlib import sha256

from paychan.protocol.errors import Malformed
from paychan.protocol.types import OutPoint, Sat

ID_BYTES = 16
MAX_KEY_CHARACTERS = 255
"""Longest `Idempotency-Key`; the draft names no limit, 255 is what payment services accept."""

NO_BODY = sha256(b"").digest()
"""Digest of an empty body."""

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{16,128}")
_PLAIN_KEY = re.compile(r"[\x21\x23-\x2b\x2d-\x5b\x5d-\x7e]+")
_QUOTED_KEY = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')


def named_id(channel: OutPoint, name: str) -> bytes:
    """Return the id of a request that the payer named; two channels never share one."""
    return _digest(b"named", channel.serialize(), name.encode())


def derived_id(channel: OutPoint, change_sat: Sat, method: str, url: str, body_sha256: bytes = NO_BODY) -> bytes:
    """Return the id of a request without a name: its payment's change value, its method, URL as sent, and body."""
    return _digest(
        b"derived", channel.serialize(), change_sat.to_bytes(8, "little"), method.encode(), url.encode(), body_sha256
    )


def content_id(method: str, url: str, body_sha256: bytes = NO_BODY) -> bytes:
    """Return a digest of the request without its payment: a name may be used again for an equal request alone."""
    return _digest(b"content", method.encode(), url.encode(), body_sha256)


def idempotency_key(header: str) -> str:
    """Read an `Idempotency-Key` header: a quoted string (RFC 8941, 3.3.3), or the bare text that many clients send.

    Raises:
        Malformed: empty, too long, or neither.
    """
    text = header.strip(" \t")
    quoted = _QUOTED_KEY.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not 1 <= len(key) <= MAX_KEY_CHARACTERS or not (quoted or _PLAIN_KEY.fullmatch(text)):
        raise Malformed(field="Idempotency-Key", reason=f"want a quoted string of 1 to {MAX_KEY_CHARACTERS} characters")
    return key


def payment_identifier(text: str) -> str:
    """Check the `id` of x402's extension `payment-identifier`.

    Raises:
        Malformed: not 16 to 128 letters, digits, `_` or `-`.
    """
    if not _IDENTIFIER.fullmatch(text):
        raise Malformed(field="payment-identifier", reason="want 16 to 128 letters, digits, _ or -")
    return text


def _digest(*parts: bytes) -> bytes:
    """Hash the parts, each after its length, so that no two lists of parts have the same bytes."""
    return sha256(b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest()[:ID_BYTES]
