"""JSON of the two protocol versions: decoding of request bodies, encoding of results (RBPCP §4, §5.5, §6)."""

from __future__ import annotations

import json
import re
from enum import Enum
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from paychan.protocol.errors import Malformed, Missing, PaychanError, Repeated
from paychan.protocol.payment import Payment, make_payment
from paychan.protocol.types import OutPoint, Sat

_HEX = re.compile(r"[0-9a-f]*")
_NAMES = (
    "payment_data",
    "application_data",
    "redeem_script",
    "funding_txid",
    "funding_vout",
    "signature_data",
    "change_value",
    "change_address",
    "sighash_flag",
)
_QUOTED_NAMES = tuple(f'"{name}"'.encode() for name in _NAMES)


class Dialect(Enum):
    """The two published forms of v2: S is that of the Swagger document, A that of the Haskell library (RBPCP §0)."""

    S = "swagger"
    A = "api"


class PaymentData(Struct, frozen=True, omit_defaults=True):
    """The payment object of a v2 body, with the keys of both dialects."""

    signature_data: str
    change_value: int
    redeem_script: str | UnsetType = UNSET
    funding_txid: str | UnsetType = UNSET
    funding_vout: int | UnsetType = UNSET
    change_address: str | UnsetType = UNSET
    sighash_flag: str | UnsetType = UNSET


class _Body(Struct, frozen=True):
    """A v2 body: `payment_data` and `application_data`, or the bare payment object, whose keys this class ignores."""

    payment_data: PaymentData | UnsetType = UNSET
    application_data: str | UnsetType = UNSET


class V2Payment(Struct, frozen=True):
    """A decoded v2 body: the payment, the facts that the body names beside it (if any), and the client's dialect."""

    payment: Payment
    dialect: Dialect
    application_data: str
    names_more: bool = False
    """Whether one of the facts below is given."""
    outpoint: OutPoint | None = None
    redeem_script: bytes | None = None
    change_address: str | None = None


class ChannelStatus(Enum):
    """`channel_status` of a result."""

    OPEN = "open"
    CLOSED = "closed"


class PaymentResult(Struct, frozen=True):
    """Answer of every accepted request; `settlement_txid` is null, "" or hex, depending on version and dialect."""

    channel_status: ChannelStatus
    channel_value_left: Sat
    value_received: Sat
    settlement_txid: str | None
    application_data: str | UnsetType = UNSET
    settlement_transaction: str | UnsetType = UNSET
    """Settlement of a v2 closing, for clients that ask for it: it shows them how much of their offer became fee."""


class FundingInfo(Struct, frozen=True, omit_defaults=True):
    """Answer of v1's fundingInfo; v2 adds the last three keys."""

    server_pubkey: str
    funding_address_copy: str
    open_price: Sat
    funding_tx_min_conf: int
    settlement_period_hours: int
    dust_limit: Sat | UnsetType = UNSET
    min_duration_hours: int | UnsetType = UNSET
    redeem_script_copy: str | UnsetType = UNSET


_body_decoder = msgspec.json.Decoder(_Body)
_bare_decoder = msgspec.json.Decoder(PaymentData)
encode_json = msgspec.json.Encoder().encode
"""Serializes a result."""


def read_v2_body(raw: bytes) -> V2Payment:
    """Read the body of a v2 request in either dialect (RBPCP §4.4).

    Raises:
        Malformed: not JSON, a wrong type, not lower-case hex, a signature whose length does not fit.
        Missing: the body lacks a key that every payment needs.
        Repeated: the body has a key twice, and parsers would disagree about its value.
    """
    try:
        body = _body_decoder.decode(raw)
        data = _bare_decoder.decode(raw) if body.payment_data is UNSET else body.payment_data
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _json_problem(error) from None
    named = (data.funding_txid, data.funding_vout, data.redeem_script, data.change_address)
    given = len(named) - named.count(UNSET)
    # the keys that are known; a body with as many keys repeats none
    keys = 2 + given + (data is body.payment_data) + (data.sighash_flag is not UNSET)
    application_data = body.application_data
    if application_data is UNSET:
        application_data = ""
    else:
        keys += 1
    if raw.count(b'":') != keys or b"\\" in raw:
        _refuse_repeated_keys(raw)
    signature, flag, dialect = _signature_parts(data)
    payment = make_payment(data.change_value, signature, flag)
    if not given:
        return V2Payment(payment, dialect, application_data)
    return V2Payment(
        payment=payment,
        dialect=dialect,
        application_data=application_data,
        names_more=True,
        outpoint=_outpoint(data),
        redeem_script=_hex(data.redeem_script, "redeem_script"),
        change_address=None if data.change_address is UNSET else data.change_address,
    )


def payment_data(payment: Payment, dialect: Dialect, **facts: Any) -> PaymentData:
    """Write a payment as a client does; `facts` are the other keys of an opening."""
    if dialect is Dialect.S:
        return PaymentData(payment.signature_with_flag.hex(), payment.change_sat, **facts)
    return PaymentData(payment.signature.hex(), payment.change_sat, sighash_flag=f"{payment.flag:02x}", **facts)


def opening_secret(payment: Payment) -> bytes:
    """Name of a v2 channel: SHA256 of the opening payment's DER signature and flag byte (RBPCP §6.2)."""
    return sha256(payment.signature_with_flag).digest()


def read_secret(text: str) -> bytes | None:
    """Read the `secret` parameter, which may have JSON quotes or upper case; None if it is no secret."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    text = text.lower()
    return bytes.fromhex(text) if len(text) == 64 and _HEX.fullmatch(text) else None


def _signature_parts(data: PaymentData) -> tuple[bytes, int, Dialect]:
    """Split `signature_data`: dialect S appends the flag byte, A sends it as `sighash_flag`."""
    raw = _hex(data.signature_data, "signature_data") or b""
    size = 2 + raw[1] if len(raw) > 1 else 0
    if data.sighash_flag is UNSET:
        if len(raw) != size + 1:
            raise Malformed(field="signature_data", reason=f"got {len(raw)} bytes, want DER and one flag byte")
        return raw[:-1], raw[-1], Dialect.S
    flag = _hex(data.sighash_flag, "sighash_flag")
    if flag is None or len(flag) != 1:
        raise Malformed(field="sighash_flag", reason="want one byte of hex")
    if len(raw) not in (size, size + 1) or raw[size:] not in (b"", flag):
        raise Malformed(field="signature_data", reason=f"got {len(raw)} bytes, want DER, or DER and the same flag")
    return raw[:size], flag[0], Dialect.A


def _outpoint(data: PaymentData) -> OutPoint | None:
    if data.funding_txid is UNSET and data.funding_vout is UNSET:
        return None
    if data.funding_txid is UNSET or data.funding_vout is UNSET:
        raise Missing(field="funding_txid" if data.funding_txid is UNSET else "funding_vout")
    return OutPoint.parse(data.funding_txid, data.funding_vout)


def _hex(text: str | UnsetType, field: str) -> bytes | None:
    """Read lower-case hex only; `bytes.fromhex` alone accepts spaces and upper case."""
    if text is UNSET:
        return None
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if raw.hex() != text:
        raise Malformed(field=field, reason="want lower-case hex")
    return raw


def _json_problem(error: Exception) -> PaychanError:
    """Return a refusal that names the field that msgspec rejected."""
    text = str(error)
    missing = re.match(r"Object missing required field `(\w+)`", text)
    if missing:
        return Missing(field=missing[1])
    path = re.search(r" - at `\$\.([\w.]+)`", text)
    if path:
        return Malformed(field=path[1], reason=text[: path.start()])
    return Malformed(field="body", reason=text[:120])


def _refuse_repeated_keys(raw: bytes) -> None:
    """Refuse repeated keys. A text search clears most bodies; only an escape or a repeated name needs the parser."""
    if b"\\" not in raw and all(raw.count(name) <= 1 for name in _QUOTED_NAMES):
        return

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if name in _NAMES and names.count(name) > 1:
                raise Repeated(field=name)
        return dict(pairs)

    try:
        json.loads(raw, object_pairs_hook=check, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        raise Malformed(field="body", reason="not JSON") from None
