"""Signed receipts: proof that a server was paid for a request, by the receipt and the identity key alone.

A receipt is canonical JSON (RFC 8785). The key that signs it is certified by the server's identity key, and the
certificate is in the receipt. The signature covers the tagged hash of the receipt without its member `signature`.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from coincurve import PrivateKey
from msgspec import Meta, Struct

from paychan.protocol.certificate import Certificate, is_signed, tagged_hash
from paychan.protocol.errors import PaychanError
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat, UnixTime
from paychan.protocol.wire.canonical import canonical_json, read_time, time_text

TAG = "paychan/receipt"
VERSION = 1
MAX_RECEIPT_BYTES = 32 * 1024
"""Largest receipt that is read; the URL is what makes one long."""


class Paid(Struct, frozen=True):
    """A request that was paid: what the receipt is about."""

    channel: OutPoint
    change_sat: Sat
    """Change of the newest payment, which the server has."""
    charged_sat: Sat
    """Price of this request."""
    credit_sat: Sat
    """The sum that the payer has paid beyond all charges, after this one."""
    method: str
    url: str
    time: UnixTime
    request_sha256: bytes | None = None
    """SHA-256 of the request's body, 32 bytes; None: not known."""
    answer_sha256: bytes | None = None


class Fault(Enum):
    """Why a receipt does not verify: stable codes."""

    TOO_LARGE = "receipt_too_large"
    MALFORMED = "receipt_malformed"
    VERSION = "receipt_version"
    NOT_CANONICAL = "receipt_not_canonical"
    OTHER_IDENTITY = "receipt_other_identity"
    BAD_CERTIFICATE = "receipt_bad_certificate"
    OUTSIDE_CERTIFICATE = "receipt_outside_certificate"
    BAD_SIGNATURE = "receipt_bad_signature"


class Verified(Struct, frozen=True):
    """The key that `certificate` names signed that this was paid, and the identity in it certified that key."""

    paid: Paid
    certificate: Certificate


class NotVerified(Struct, frozen=True):
    """The receipt proves nothing; the reason is for people."""

    fault: Fault
    reason: str


def sign_receipt(paid: Paid, certificate: Certificate, key: PrivateKey) -> bytes:
    """Write the receipt of a paid request. `key` is the certificate's receipt key. Deterministic (RFC 6979).

    Raises:
        ValueError: the receipt could not be read: method or URL is not of visible ASCII, or too long.
    """
    unsigned = _Unsigned(
        identity=certificate.identity.hex(),
        certificate=_written(certificate),
        channel=str(paid.channel),
        change_sat=paid.change_sat,
        charged_sat=paid.charged_sat,
        credit_sat=paid.credit_sat,
        method=paid.method,
        url=paid.url,
        time=time_text(paid.time),
        version=VERSION,
        request_sha256=paid.request_sha256.hex() if paid.request_sha256 is not None else None,
        answer_sha256=paid.answer_sha256.hex() if paid.answer_sha256 is not None else None,
    )
    members = msgspec.to_builtins(unsigned)
    signature = key.sign(_digest(members), hasher=None)
    raw = canonical_json(members | {"signature": signature.hex()})
    if isinstance(read := _read(raw), NotVerified):
        raise ValueError(read.reason)  # noqa: TRY004 - the value is wrong, not its type
    return raw


def verify_receipt(raw: bytes, identity: bytes | None = None) -> Verified | NotVerified:
    """Verify a receipt, of which one line feed may follow. It does not expire: no present time is needed.

    `identity`: the identity key of the server that must have certified it, 33 bytes. Without one the result says which
    key did: the caller must know whose it is, since every program can make receipts of an identity that it drew.
    """
    raw = raw.removesuffix(b"\n")
    read = _read(raw)
    if isinstance(read, NotVerified):
        return read
    paid, certificate, signed = read
    if identity is not None and certificate.identity != identity:
        return NotVerified(
            Fault.OTHER_IDENTITY, f"it is of the server {certificate.identity.hex()}, want {identity.hex()}"
        )
    if problem := certificate.problem():
        return NotVerified(Fault.BAD_CERTIFICATE, f"the certificate of its key is not valid: {problem}")
    if not certificate.not_before <= paid.time <= certificate.not_after:
        times = f"from {time_text(certificate.not_before)} to {time_text(certificate.not_after)}"
        return NotVerified(Fault.OUTSIDE_CERTIFICATE, f"it is of {time_text(paid.time)}, its key is certified {times}")
    members = msgspec.to_builtins(signed)
    signature = bytes.fromhex(members.pop("signature"))
    if not is_signed(certificate.receipt_key, signature, _digest(members)):
        return NotVerified(Fault.BAD_SIGNATURE, "its signature is not that of its key: the receipt was changed")
    return Verified(paid, certificate)


# --- the JSON ---------------------------------------------------------------------------------------------------------

_Amount = Annotated[int, Meta(ge=0, le=MAX_MONEY_SAT)]
_KeyHex = Annotated[str, Meta(pattern="^0[23][0-9a-f]{64}\\Z")]
_SignatureHex = Annotated[str, Meta(pattern="^30(?:[0-9a-f]{2}){7,71}\\Z")]
_DigestHex = Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]
_Method = Annotated[str, Meta(pattern="^[!-~]{1,64}\\Z")]
_Url = Annotated[str, Meta(pattern="^[!-~]+\\Z")]


class _Written(Struct, frozen=True, forbid_unknown_fields=True):
    """The certificate. Its identity is the receipt's."""

    receipt_key: _KeyHex
    not_before: str
    not_after: str
    signature: _SignatureHex


class _Unsigned(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    identity: _KeyHex
    certificate: _Written
    channel: Annotated[str, Meta(pattern="^[0-9a-f]{64}:(?:0|[1-9][0-9]{0,9})\\Z")]
    change_sat: _Amount
    charged_sat: _Amount
    credit_sat: _Amount
    method: _Method
    url: _Url
    time: str
    version: int
    request_sha256: _DigestHex | None = None
    answer_sha256: _DigestHex | None = None


class _Signed(_Unsigned, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    signature: _SignatureHex


class _Version(Struct, frozen=True):
    version: int


_read_version = msgspec.json.Decoder(_Version).decode
_read_signed = msgspec.json.Decoder(_Signed).decode


def _written(certificate: Certificate) -> _Written:
    return _Written(
        certificate.receipt_key.hex(),
        time_text(certificate.not_before),
        time_text(certificate.not_after),
        certificate.signature.hex(),
    )


def _read(raw: bytes) -> tuple[Paid, Certificate, _Signed] | NotVerified:
    if len(raw) > MAX_RECEIPT_BYTES:
        return NotVerified(Fault.TOO_LARGE, f"it has {len(raw)} bytes, limit {MAX_RECEIPT_BYTES} bytes")
    try:
        version = _read_version(raw).version
        if version != VERSION:
            return NotVerified(Fault.VERSION, f"it has version {version}, want {VERSION}: update this program")
        signed = _read_signed(raw)
        if canonical_json(msgspec.to_builtins(signed)) != raw:
            return NotVerified(Fault.NOT_CANONICAL, "its JSON is not in the canonical form in which it was written")
        return _paid(signed), _certificate(signed), signed
    except (msgspec.MsgspecError, PaychanError, ValueError, RecursionError) as error:
        return NotVerified(Fault.MALFORMED, f"it is no receipt: {error}")


def _paid(signed: _Signed) -> Paid:
    txid, _, vout = signed.channel.partition(":")
    return Paid(
        OutPoint.parse(txid, int(vout)),
        Sat(signed.change_sat),
        Sat(signed.charged_sat),
        Sat(signed.credit_sat),
        signed.method,
        signed.url,
        _exact_time(signed.time, "time"),
        _bytes(signed.request_sha256),
        _bytes(signed.answer_sha256),
    )


def _certificate(signed: _Signed) -> Certificate:
    written = signed.certificate
    return Certificate(
        bytes.fromhex(signed.identity),
        bytes.fromhex(written.receipt_key),
        _exact_time(written.not_before, "not_before"),
        _exact_time(written.not_after, "not_after"),
        bytes.fromhex(written.signature),
    )


def _exact_time(text: str, field: str) -> UnixTime:
    """Read a time in the one form that `time_text` writes. Raises `PaychanError`, `ValueError`."""
    time = read_time(text, field)
    if time_text(time) != text:
        msg = f"{field}: want UTC to the second, such as {time_text(time)}"
        raise ValueError(msg)
    return time


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)


def _digest(unsigned: dict[str, object]) -> bytes:
    return tagged_hash(TAG, canonical_json(unsigned))
