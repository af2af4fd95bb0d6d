"""Challenges in `WWW-Authenticate` (RFC 9110, 11.6.1): several schemes, in one field or joined from several by commas."""

from __future__ import annotations

import re
from collections.abc import Iterable

from paychan.protocol.unpaid import MalformedPayment, PaymentTooLarge

FIELD = "WWW-Authenticate"
MAX_BYTES = 65_536
"""Longest value read, all fields together: it may hold challenges of several methods."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110, 5.6.2
_SEPARATOR = re.compile(r"[ \t,]*")
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+|(?=,)|$)")
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))[ \t]*(?=,|$)', re.DOTALL)
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|$)")
_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\(.)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def read_challenges(values: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """Split the values of all fields into challenges: the scheme in lower case, and its parameters.

    A scheme with a token in place of parameters (`Negotiate abc=`) has none here.

    Raises:
        PaymentTooLarge: more than `MAX_BYTES` characters together.
        MalformedPayment: a text that is no list of challenges, or a parameter that is there twice.
    """
    text = ", ".join(values)
    if len(text) > MAX_BYTES:
        raise PaymentTooLarge(field=FIELD, got_bytes=len(text), limit_bytes=MAX_BYTES)
    found: list[tuple[str, dict[str, str]]] = []
    place = _after(_SEPARATOR, text, 0)
    while place < len(text):
        parameter = _PARAMETER.match(text, place) if found else None
        if parameter is not None:
            _enter(found[-1][1], parameter)
            place = _after(_SEPARATOR, text, parameter.end())
            continue
        scheme = _SCHEME.match(text, place)
        if scheme is None:
            raise MalformedPayment(field=FIELD, reason=f"no challenge at character {place}")
        found.append((scheme[1].lower(), {}))
        place = scheme.end()
        if not _PARAMETER.match(text, place):
            place = _after(_TOKEN68, text, place)
        place = _after(_SEPARATOR, text, place)
    return found


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place


def _enter(parameters: dict[str, str], found: re.Match[str]) -> None:
    name = found[1].lower()
    if name in parameters:
        raise MalformedPayment(field=FIELD, reason=f"{name[:40]} is there twice")
    parameters[name] = found[3] if found[2] is None else unquoted(found[2])


def quoted(text: str) -> str:
    r"""Write a quoted string; characters beyond ASCII become `\uXXXX`, as the SDKs of MPP write them.

    Raises:
        ValueError: a control character, which no header may hold.
    """
    if _CONTROL.search(text):
        msg = "a header may not hold control characters"
        raise ValueError(msg)
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    if not plain.isascii():
        plain = "".join(c if c.isascii() else _utf16(c) for c in plain)
    return f'"{plain}"'


def _utf16(character: str) -> str:
    raw = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{raw[at : at + 2].hex()}" for at in range(0, len(raw), 2))


def unquoted(text: str) -> str:
    """Read the inside of a quoted string; a lone surrogate becomes U+FFFD."""
    return _ESCAPES.sub(_plain, text)


def _plain(found: re.Match[str]) -> str:
    if found[1] is not None:
        return found[1]
    return bytes.fromhex(found[0].replace("\\u", "")).decode("utf-16-be", "replace")
