"""What an answer is made of, whichever way it leaves: headers, reason phrase, the one error object, the one 404."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from paychan.api.incidents import told_to_strangers
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
    Unavailable,
)
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.rbpcp import encode_json

HEADERS = {
    "Server": "paychan",
    "Content-Type": "application/json",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET,POST,PUT,DELETE",
    "Access-Control-Allow-Headers": "Origin,Accept,Content-Type",
    "Access-Control-Expose-Headers": "Location",
}
"""On every answer to clients, also on errors (RBPCP §5.6)."""

OUTPOINT = r"([0-9a-f]{64})/(0|[1-9][0-9]{0,9})"
"""How a channel is named in a path: one name each."""

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]|<")
"""Tornado replaces a whole reason phrase that has a `<`."""

_MAX_REASON_CHARS = 200
_RETRY_AFTER_SECONDS = 5

_SHOWN_TRANSACTION_BYTES = 20_000
"""Clients read 64 KiB, and a transaction is in hex."""

_NOT_FOUND_SECONDS = 0.005
"""A 404 leaves this long after its request was read, whatever was looked up meanwhile, so its time reveals nothing."""


class Answer(Struct, frozen=True):
    """Status, reason phrase, body, and headers beside `HEADERS`."""

    status: int
    reason: str | None
    body: bytes
    headers: Sequence[tuple[str, str]] = ()


def result(status: int, reason: str | None, value: Any) -> Answer:
    """Make the answer to what was accepted."""
    return Answer(status, reason, encode_json(value) + b"\n")


def refusal(error: PaychanError, *, quiet_404: bool, to_operator: bool = False) -> Answer:
    """Make the answer to what was not. v2 says nothing in a 404: unknown channel and wrong secret are one (RBPCP §6.7).

    Only the operator reads reasons that come from inside the server.
    """
    text, fields = (str(error), error.fields) if to_operator else told_to_strangers(error)
    headers = []
    if isinstance(error, Unavailable | TooManyRequests):
        headers = [("Retry-After", str(error.fields.get("wait_seconds", _RETRY_AFTER_SECONDS)))]
    body = b"" if quiet_404 and isinstance(error, NotFound) else encode_json(_error_object(error, text, fields)) + b"\n"
    return Answer(error.http_status, _reason(text), body, headers)


def moved(error: ChannelMoved, status: int, location: str, transaction: bytes | None) -> Answer:
    """Make the answer that a channel goes on elsewhere, with what proves it: the transaction whose output it is."""
    shown = _error_object(error, str(error), error.fields) | ({"transaction": transaction.hex()} if transaction else {})
    return Answer(status, _reason(str(error)), encode_json(shown) + b"\n", [("Location", location)])


def _reason(text: str) -> str:
    return _NOT_PRINTABLE.sub("?", text)[:_MAX_REASON_CHARS]


def _error_object(error: PaychanError, text: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Build the one error object that satisfies all published versions (RBPCP §5.7, §6.7)."""
    kind = "application_error" if isinstance(error, ApplicationRefused) else "payment_error"
    return {"code": error.code, "error": text, "error_msg": text, "type": kind, "message": text, **fields}


def accepted(outcome: Outcome) -> Accepted:
    """Pass what was accepted, raise what was not."""
    if isinstance(outcome, Rejected):
        raise outcome.error
    return outcome


async def accept(judging: Awaitable[Outcome]) -> Accepted:
    """Await an outcome; pass what was accepted, raise what was not."""
    return accepted(await judging)


def when_404s_leave(began: float) -> float:
    """Return the moment at which every 404 leaves whose request was read then (times of the event loop's clock).

    uvloop's clock stands still during a turn of the loop, and its timers count whole milliseconds of it. So a request that
    was read in a turn has the same moment however long parsing and lookup took in that turn and in later ones.
    """
    spent = asyncio.get_running_loop().time() - began
    return began + _NOT_FOUND_SECONDS * (1 + spent // _NOT_FOUND_SECONDS)


async def until_404s_leave(began: float) -> None:
    """Wait until the moment of `when_404s_leave`."""
    loop = asyncio.get_running_loop()
    leaves = asyncio.Event()  # a future that was cancelled in the turn in which its time comes can't be set
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
    """Read ASCII digits: `int()` alone would take signs, underscores and other scripts' digits.

    Raises:
        Malformed: anything else, or more digits than any field has.
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
    """Displayed txid of a channel's settlement, if it is signed: the one that confirmed, or else the newest."""
    closing = channel.closing
    if closing is None or closing.settlement is None:
        return None
    confirmed = closing.spent_by if channel.state is State.CLOSED else b""
    return (confirmed or closing.settlement.txid)[::-1].hex()


def settlement_transaction(channel: Channel) -> str | UnsetType:
    """Hex of the newest settlement that was signed, unless another confirmed, or it is too large for an answer."""
    closing = channel.closing
    settlement = closing.settlement if closing is not None else None
    if closing is None or settlement is None or len(settlement.transaction) > _SHOWN_TRANSACTION_BYTES:
        return UNSET
    is_other = channel.state is State.CLOSED and closing.spent_by not in (b"", settlement.txid)
    return UNSET if is_other else settlement.transaction.hex()
