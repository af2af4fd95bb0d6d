"""The application's answer to a question: a clear yes, a clear no, or neither. Pure functions of status, headers and body."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import msgspec
from msgspec import UNSET, Struct, UnsetType

from paychan.callback.base import ApplicationSilent, Verdict

MAX_ANSWER_BYTES = 4096
"""Longest answer, before and after the decoding of its content."""

_BOM = b"\xef\xbb\xbf"
_NO_CONTENT = 204
_WITH_ANSWER = (200, 201)

_WINDOW_ANY, _WINDOW_RAW = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS
"""zlib's words for "a gzip or zlib header" and for "no header"."""

_GZIP, _DEFLATE = ("gzip", "x-gzip"), "deflate"


class _Reply(Struct, frozen=True):
    """One key at least: JSON without both is the answer of some other program, and neither yes nor no."""

    resp_app_data: str | UnsetType | None = UNSET
    resp_app_error: str | UnsetType | None = UNSET


_decoder = msgspec.json.Decoder(_Reply)


def verdict(status: int, headers: Mapping[str, str], raw: bytes) -> Verdict:
    """Read an answer. Its body is JSON in UTF-8, whatever its Content-Type says; 204 is a yes without text.

    Raises:
        ApplicationSilent: the answer is neither a clear yes nor a clear no.
    """
    if status == _NO_CONTENT:
        return Verdict()
    if status not in _WITH_ANSWER:
        msg = f"status {status}, need 200, 201 or 204"
        raise ApplicationSilent(msg)
    try:
        reply = _decoder.decode(_decoded(headers.get("content-encoding", ""), raw).removeprefix(_BOM))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApplicationSilent(str(error)) from error
    if reply.resp_app_data is UNSET and reply.resp_app_error is UNSET:
        msg = "an answer without resp_app_data and resp_app_error"
        raise ApplicationSilent(msg)
    if isinstance(reply.resp_app_error, str):
        return Verdict(refusal=reply.resp_app_error or "no reason given")
    return Verdict(data=reply.resp_app_data or "")


def _decoded(coding: str, raw: bytes) -> bytes:
    """Undo the content coding (RFC 9110 8.4): the server asks for none, but some servers compress all the same."""
    codings = [each.strip().lower() for each in coding.split(",")]
    codings = [each for each in codings if each not in ("", "identity")]
    if len(codings) > 1 or any(each not in (*_GZIP, _DEFLATE) for each in codings):
        msg = f"Content-Encoding {coding[:40]!r}, need identity, gzip or deflate"
        raise ApplicationSilent(msg)
    if not codings:
        return _short(raw)
    try:
        return _inflated(raw, _WINDOW_ANY)
    except zlib.error as error:
        if codings != [_DEFLATE]:
            raise ApplicationSilent(str(error)) from error
    try:  # RFC 9110 8.4.1.2: "Some non-conformant implementations send the "deflate" compressed data without the zlib wrapper"
        return _inflated(raw, _WINDOW_RAW)
    except zlib.error as error:
        raise ApplicationSilent(str(error)) from error


def _inflated(raw: bytes, window: int) -> bytes:
    """Decompress all members, but no more bytes than an answer may have.

    Raises:
        zlib.error: not of this form, or truncated.
        ApplicationSilent: the content is too long.
    """
    content = b""
    while raw:
        member = zlib.decompressobj(window)
        content += member.decompress(raw, MAX_ANSWER_BYTES + 1 - len(content))
        _short(content)
        if not member.eof:
            msg = "the compressed answer is truncated"
            raise zlib.error(msg)
        raw = member.unused_data
    return content


def _short(content: bytes) -> bytes:
    if len(content) > MAX_ANSWER_BYTES:
        msg = f"an answer of more than {MAX_ANSWER_BYTES} bytes"
        raise ApplicationSilent(msg)
    return content
