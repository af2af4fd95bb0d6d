"""Answers for handlers, the fast path and streams: headers, reason phrase, error object, time of a 404."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from paychan.api.incidents import public_text_and_fields
from paychan.protocol.channel import Accepted, Channel, Outcome, Rejected, State
from paychan.protocol.errors import (
    ApplicationRefused,
    ChannelMoved,
    Malformed,
    Missing,
    NotFound,
    PaychanError,
    Repeated,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.rbpcp import encode_json

HEADERS = {
    "Server": "paychan",
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET,POST,PUT,DELETE",
    "Access-Control-Allow-Headers": "Origin,Accept,Content-Type",
    "Access-Control-Expose-Headers": "Location,Retry-After,Date",
}
"""On every answer to clients, also on errors (RBPCP §5.6).

Answers hold secrets, or the state of money at one moment. RFC 9111 5.2.2.5: "a cache MUST NOT store any part of either the
immediate request or the response".
"""

OUTPOINT = r"([0-9a-f]{64})/(0|[1-9][0-9]{0,9})"
"""An outpoint in a path. The pattern accepts only one form of each outpoint."""

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]|<")
"""Tornado replaces a reason phrase that contains `<` as a whole."""

_MAX_REASON_CHARS = 200
_RETRY_AFTER_SECONDS = 5

_SHOWN_TRANSACTION_BYTES = 20_000
"""Largest transaction in an answer: clients read 64 KiB, and hex doubles the size."""

_NOT_FOUND_SECONDS = 0.005
"""A 404 is sent this time after its request was read, so that the response time reveals nothing about the lookup."""


class Answer(Struct, frozen=True):
    """Status, reason phrase, body, and headers beside `HEADERS`."""

    status: int
    reason: str | None
    body: bytes
    headers: Sequence[tuple[str, str]] = ()


def result(status: int, reason: str | None, value: Any) -> Answer:
    """Make the answer to an accepted request."""
    return Answer(status, reason, encode_json(value) + b"\n")


def refusal(error: PaychanError, *, quiet_404: bool, to_operator: bool = False) -> Answer:
    """Make the answer to a refused request.

    In v2 a 404 has no body, so that an unknown channel and a wrong secret look the same (RBPCP §6.7). Only the operator
    gets reasons that come from inside the server.
    """
    text, fields = (str(error), error.fields) if to_operator else public_text_and_fields(error)
    headers = []
    if isinstance(error, Unavailable | TooManyRequests):
        seconds = error.fields.get("wait_seconds", _RETRY_AFTER_SECONDS)
        headers = [("Retry-After", str(seconds))]
        fields = {**fields, "retry_after": seconds}  # a stream has no headers
    if isinstance(error, Unauthorized):
        # RFC 9110 15.5.2: a 401 "MUST send a WWW-Authenticate header field"
        headers = [("WWW-Authenticate", "Bearer")]
    body = b"" if quiet_404 and isinstance(error, NotFound) else encode_json(_error_object(error, text, fields)) + b"\n"
    return Answer(error.http_status, _reason(text), body, headers)


def moved(error: ChannelMoved, status: int, location: str, transaction: bytes | None) -> Answer:
    """Make the answer that a channel continues at another outpoint, with the transaction of that output as proof."""
    shown = _error_object(error, str(error), error.fields) | ({"transaction": transaction.hex()} if transaction else {})
    return Answer(status, _reason(str(error)), encode_json(shown) + b"\n", [("Location", location)])


def _reason(text: str) -> str:
    return _NOT_PRINTABLE.sub("?", text)[:_MAX_REASON_CHARS]


def _error_object(error: PaychanError, text: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Build the one error object that satisfies all published versions (RBPCP §5.7, §6.7)."""
    kind = "application_error" if isinstance(error, ApplicationRefused) else "payment_error"
    return {"code": error.code, "error": text, "error_msg": text, "type": kind, "message": text, **fields}


def accepted(outcome: Outcome) -> Accepted:
    """Return an accepted outcome; raise the error of a rejected one."""
    if isinstance(outcome, Rejected):
        raise outcome.error
    return outcome


async def accept(judging: Awaitable[Outcome]) -> Accepted:
    """Await an outcome; return it if it is accepted, else raise its error."""
    return accepted(await judging)


def when_404s_leave(began: float) -> float:
    """Return when to send a 404 whose request was read at `began` (both in seconds of the event loop's clock).

    The time is `began` plus a multiple of `_NOT_FOUND_SECONDS`, so it does not depend on how long parsing and lookup took
    within one such step.
    """
    spent = asyncio.get_running_loop().time() - began
    return began + _NOT_FOUND_SECONDS * (1 + spent // _NOT_FOUND_SECONDS)


async def until_404s_leave(began: float) -> None:
    """Wait until the time of `when_404s_leave`."""
    loop = asyncio.get_running_loop()
    leaves = asyncio.Event()  # a future would raise if it is cancelled in the turn in which the timer fires
    timer = loop.call_at(when_404s_leave(began), leaves.set)
    try:
        await leaves.wait()
    finally:
        timer.cancel()


def parameter(arguments: Mapping[str, Sequence[bytes]], name: str) -> str:
    """Return a query parameter.

    Raises:
        Missing, Repeated, Malformed: not exactly one, or not UTF-8.
    """
    values = arguments.get(name, ())
    if not values:
        raise Missing(field=name)
    if len(values) > 1:
        raise Repeated(field=name)
    try:
        return values[0].decode()
    except UnicodeDecodeError:
        raise Malformed(field=name, reason="not UTF-8") from None


def number(text: str, field: str) -> int:
    """Read ASCII digits; `int()` alone would also accept signs, underscores and the digits of other scripts.

    Raises:
        Malformed: the text has other characters, or more than 16 digits.
    """
    if not re.fullmatch(r"[0-9]{1,16}", text):
        raise Malformed(field=field, reason="want decimal digits")
    return int(text)


def outpoint(txid: str, vout: str) -> OutPoint:
    """Read an outpoint from a path."""
    return OutPoint.parse(txid, number(vout, "funding_vout"))


def outpoint_of(error: PaychanError) -> OutPoint:
    """Read the outpoint that an error names."""
    return outpoint(*str(error.fields["outpoint"]).split(":"))


def settlement_txid(channel: Channel) -> str | None:
    """Return the displayed txid of a channel's settlement if one is signed: the confirmed one, else the newest."""
    closing = channel.closing
    if closing is None or closing.settlement is None:
        return None
    confirmed = closing.spent_by if channel.state is State.CLOSED else b""
    return (confirmed or closing.settlement.txid)[::-1].hex()


def settlement_transaction(channel: Channel) -> str | UnsetType:
    """Return the newest signed settlement in hex; `UNSET` if another one confirmed or it is too large for an answer."""
    closing = channel.closing
    settlement = closing.settlement if closing is not None else None
    if closing is None or settlement is None or len(settlement.transaction) > _SHOWN_TRANSACTION_BYTES:
        return UNSET
    is_other = channel.state is State.CLOSED and closing.spent_by not in (b"", settlement.txid)
    return UNSET if is_other else settlement.transaction.hex()
