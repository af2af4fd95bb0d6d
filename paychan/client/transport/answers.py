"""Read the server's answers without trusting them: results are compared with the signed payments."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import msgspec

from paychan.client.errors import (
    ChannelConflict,
    ChannelGone,
    ChannelMoving,
    ChannelUnknown,
    CountedLess,
    PaymentPending,
    PaymentRefused,
    Refused,
    ServerFailed,
    ServerMisbehaved,
)
from paychan.client.transport.effects import MOVED, Response
from paychan.protocol.wire.rbpcp import ChannelStatus, PaymentResult

TXID = re.compile(r"[0-9a-f]{64}")
_MAX_REASON_CHARS = 300

_BY_STATUS: dict[int, type[Refused]] = {
    400: PaymentRefused,
    404: ChannelUnknown,
    409: ChannelConflict,
    410: ChannelGone,
    429: ServerFailed,
    **dict.fromkeys(MOVED, ServerFailed),
}

_BY_CODE: dict[str, type[Refused]] = {"channel_moving": ChannelMoving, "payment_pending": PaymentPending}
"""Kinds that follow from the code, whatever the status."""


def refusal(response: Response) -> Refused:
    """Parse a refusal: from its JSON body, or without one from the reason phrase (RBPCP §5.7, §6.7)."""
    try:
        fields: Any = json.loads(response.body)
    except (ValueError, RecursionError):
        fields = {}
    if not isinstance(fields, dict):
        fields = {}
    code, reason = fields.pop("code", ""), fields.pop("error", "") or response.reason
    kind = ServerFailed if response.status >= 500 else _BY_STATUS.get(response.status, Refused)
    kind = _BY_CODE.get(code, kind) if isinstance(code, str) else kind
    return kind(response.status, printable(code), printable(reason), fields)


def printable(value: object) -> str:
    """Return the server's text, shortened and without control characters, which a terminal would execute."""
    return "".join(c if c.isprintable() else " " for c in str(value)[:_MAX_REASON_CHARS])


def read_result(response: Response) -> PaymentResult:
    """Parse a success.

    Raises:
        Refused: the status is no success.
        ServerMisbehaved: not the JSON object of RBPCP §5.5 (D22: other text is not a balance).
    """
    if response.status not in (200, 201, 202):
        raise refusal(response)
    try:
        return msgspec.json.decode(response.body, type=PaymentResult)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ServerMisbehaved(what="result", got=str(error)[:120], want="the documented JSON object") from None


def check_result(
    result: PaymentResult,
    status: ChannelStatus,
    left: Collection[int],
    received: Collection[int],
    most_sat: int = 0,
    earlier_sat: int = 0,
) -> None:
    """Compare a result with the signed payment.

    A server with a restored backup books earlier payments again, together with the present one. So the received value
    may exceed the expected values `received`, up to `most_sat`: all that was paid from the channel's output, after
    `earlier_sat` at earlier ones.

    Raises:
        CountedLess: less was received, and all else is as signed.
        ServerMisbehaved: status or amounts contradict it.
    """
    if result.channel_status is not status:
        raise ServerMisbehaved(what="channel_status", got=result.channel_status.value, want=status.value)
    if result.channel_value_left not in left:
        raise ServerMisbehaved(what="channel_value_left", got=result.channel_value_left, want=_either(left))
    least, most = (received[0], received[-1]) if isinstance(received, range) else (min(received), max(received))
    if 0 <= result.value_received < least:
        raise CountedLess(
            what="value_received",
            got=result.value_received,
            want=_either(received),
            total_sat=earlier_sat + most_sat,
            left_sat=result.channel_value_left,
        )
    if result.value_received not in received and not most < result.value_received <= most_sat:
        raise ServerMisbehaved(what="value_received", got=result.value_received, want=_either(received))


def settlement_txid(result: PaymentResult, *, may_wait: bool = False) -> str:
    """Return the txid of a closed channel's settlement; "" while it is pending, if `may_wait` allows that.

    Raises:
        ServerMisbehaved: not the text of a txid.
    """
    text = result.settlement_txid or ""
    if not TXID.fullmatch(text) and (text or not may_wait):
        raise ServerMisbehaved(what="settlement_txid", got=printable(text)[:70] or "none", want="64 hex digits")
    return text


def _either(values: Collection[int]) -> str:
    if isinstance(values, range):
        return f"{values[0]:,} to {values[-1]:,}"
    return " or ".join(f"{value:,}" for value in sorted(values))
