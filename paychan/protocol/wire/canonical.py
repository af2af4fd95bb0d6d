"""Texts that must be equal byte by byte: canonical JSON (RFC 8785), base64 of both alphabets, times (RFC 3339)."""

from __future__ import annotations

import binascii
import json
import re
from typing import Any

import msgspec

from paychan.protocol.types import UnixTime
from paychan.protocol.unpaid import MalformedPayment, PaymentTooLarge

_EXACT = 2**53 - 1
"""Largest integer that RFC 8785 writes exactly (RFC 7493, 2.2)."""

_TO_URL, _FROM_URL = bytes.maketrans(b"+/", b"-_"), bytes.maketrans(b"-_", b"+/")
_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.\d{1,9})?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII)
_MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_MAX_DEPTH = 16


def canonical_json(value: Any) -> bytes:
    """Write JSON by RFC 8785: keys in the order of their UTF-16 units, no spaces, no float.

    Raises:
        ValueError: a float, an integer beyond 2^53 - 1, a lone surrogate, a key that is no text, or deep nesting.
    """
    if _has_plain_keys(value, _MAX_DEPTH):
        return msgspec.json.encode(value, order="deterministic")
    return msgspec.json.encode(_sorted(value))


def _has_plain_keys(value: Any, depth: int) -> bool:
    """Say whether all keys are ASCII, whose order is the same in every encoding; refuse what has no canonical form."""
    if isinstance(value, str):
        value.encode()
        return True
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int) and abs(value) <= _EXACT:
        return True
    if not isinstance(value, dict | list | tuple) or depth == 0:
        msg = f"{str(value)[:40]!r} has no canonical form, or is nested deeper than {_MAX_DEPTH}"
        raise ValueError(msg)
    if not isinstance(value, dict):
        return all([_has_plain_keys(item, depth - 1) for item in value])  # noqa: C419 - every item is checked
    if not all(isinstance(key, str) for key in value):
        msg = "a key is no text"
        raise ValueError(msg)
    plain = [_has_plain_keys(item, depth - 1) & key.isascii() for key, item in value.items()]
    return all(plain)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value, key=_utf16)}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value


def _utf16(key: str) -> bytes:
    return key.encode("utf-16-be")


def to_base64(raw: bytes) -> str:
    """Write base64 with the standard alphabet and padding (RFC 4648, 4), as x402 does."""
    return binascii.b2a_base64(raw, newline=False).decode()


def from_base64(text: str, field: str, limit_bytes: int) -> bytes:
    """Read base64 with the standard alphabet and padding, of at most `limit_bytes` characters.

    Raises:
        PaymentTooLarge, MalformedPayment: too long; another alphabet, without padding, or bits after the end.
    """
    _limit(text, field, limit_bytes)
    try:
        raw = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raw = None
    if raw is None or to_base64(raw) != text:
        raise MalformedPayment(field=field, reason="not base64 with the alphabet A-Z a-z 0-9 + / and padding")
    return raw


def to_base64url(raw: bytes) -> str:
    """Write base64url without padding (RFC 4648, 5), as MPP does."""
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL).decode()


def from_base64url(text: str, field: str, limit_bytes: int) -> bytes:
    """Read base64url without padding, of at most `limit_bytes` characters.

    Raises:
        PaymentTooLarge, MalformedPayment: too long; another alphabet, with padding, or bits after the end.
    """
    _limit(text, field, limit_bytes)
    try:
        padded = text.encode("ascii").translate(_FROM_URL) + b"==="[: -len(text) % 4]
        raw = binascii.a2b_base64(padded, strict_mode=True)
    except ValueError:
        raw = None
    if raw is None or to_base64url(raw) != text:
        raise MalformedPayment(field=field, reason="not base64 with the alphabet A-Z a-z 0-9 - _ and without padding")
    return raw


def _limit(text: str, field: str, limit_bytes: int) -> None:
    if len(text) > limit_bytes:
        raise PaymentTooLarge(field=field, got_bytes=len(text), limit_bytes=limit_bytes)


def json_object(raw: bytes, field: str) -> dict[str, Any]:
    """Read a JSON object that has no key twice and no number that JSON lacks.

    Raises:
        MalformedPayment: another text, another value, a repeated key, or deep nesting.
    """
    try:
        value = msgspec.json.decode(raw)
        if msgspec.json.encode(value) != raw:  # equal bytes have each key once
            value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError):
        raise MalformedPayment(field=field, reason="not a JSON object whose keys are all different") from None
    if not isinstance(value, dict):
        raise MalformedPayment(field=field, reason="not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a key is there twice"
        raise ValueError(msg)
    return found


def _no_constant(name: str) -> Any:
    msg = f"{name} is no JSON"
    raise ValueError(msg)


def time_text(time: UnixTime) -> str:
    """Write a time as RFC 3339 in UTC, to the second."""
    days, seconds = divmod(time, 86400)
    year, month, day = _civil(days)
    return f"{year:04}-{month:02}-{day:02}T{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}Z"


def read_time(text: str, field: str) -> UnixTime:
    """Read an RFC 3339 time; fractions of a second are cut off.

    Raises:
        MalformedPayment: another text, or a time that no calendar has.
    """
    found = _TIME.fullmatch(text)
    if found is not None:
        year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        ahead = (int(found[8]) * 3600 + int(found[9]) * 60) * (1 if found[7] == "+" else -1) if found[7] else 0
        if (
            1 <= month <= 12
            and 1 <= day <= _MONTH_DAYS[month - 1] + (leap and month == 2)
            and hour <= 23
            and minute <= 59
            and second <= 60
            and abs(ahead) < 86400
        ):
            return UnixTime(_days(year, month, day) * 86400 + hour * 3600 + minute * 60 + second - ahead)
    raise MalformedPayment(field=field, reason="not a time by RFC 3339")


def _days(year: int, month: int, day: int) -> int:
    """Count the days from 1970-01-01 in the Gregorian calendar; a year here begins in March."""
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 1 - 719468


def _civil(days: int) -> tuple[int, int, int]:
    """Return year, month and day of a count of days from 1970-01-01: the inverse of `_days`."""
    era, day = divmod(days + 719468, 146097)
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    first = (153 * month + 2) // 5
    return 400 * era + year + (month >= 10), month + 3 if month < 10 else month - 9, day - first + 1
