"""Numbers, amounts and times in the output of commands: one style for both programs."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

_AMOUNT = re.compile(r"(?<![\w.,])[1-9][0-9]{3,}(?= sat\b)", re.ASCII)
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def sat(amount: int) -> str:
    """An amount with grouped digits: `1,080 sat`."""
    return f"{amount:,} sat"


def counted(number: int, thing: str) -> str:
    """A number of things, with grouped digits: `1 channel`, `1,080 channels`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def grouped(text: str) -> str:
    """Group the digits of the amounts in a sentence, such as one of the server's: `got 1000 sat` is `got 1,000 sat`."""
    return _AMOUNT.sub(lambda found: f"{int(found[0]):,}", text)


def clock(unix: float) -> str:
    """A time in the local zone, ISO 8601 to the second with its zone: `2026-01-02T03:04:05Z`."""
    try:
        text = datetime.fromtimestamp(int(unix), UTC).astimezone().isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):  # a number from a peer that is no time of a calendar
        return f"{int(unix):,} s after 1970"
    return text.replace("+00:00", "Z")


def moment(unix: float, now: float | None = None) -> str:
    """A time and its distance from now: `2026-01-02T03:04:05Z (in 6 d 2 h)`."""
    return f"{clock(unix)} ({relative(unix - (time.time() if now is None else now))})"


def span(seconds: float) -> str:
    """A duration in its two largest units: `6 d 2 h`, `2 h 5 min`, `12 min`, `40 s`."""
    left = int(abs(seconds))
    if left < _MINUTE:
        return f"{left} s"
    if left < _HOUR:
        return f"{left // _MINUTE} min"
    large, small, names = (_HOUR, _MINUTE, ("h", "min")) if left < _DAY else (_DAY, _HOUR, ("d", "h"))
    rest = left % large // small
    return f"{left // large:,} {names[0]}" + (f" {rest} {names[1]}" if rest else "")


def relative(seconds: float) -> str:
    """The distance of a time from now: `in 6 d`, `5 min ago`."""
    return f"in {span(seconds)}" if seconds >= 0 else f"{span(seconds)} ago"


_FAILURES = {
    "ConnectError": "nothing listens there",
    "ConnectTimeout": "no connection came about in time",
    "ReadTimeout": "no answer came in time",
    "TimeoutError": "no answer came in time",
    "ReadError": "the connection broke",
    "WriteError": "the connection broke",
    "RemoteProtocolError": "the connection ended before the answer",
}


def failure(error: Exception) -> str:
    """Say in words why a request failed: the error's own text, or what its kind means, never the name of a class."""
    own = str(error)
    return own or _FAILURES.get(type(error).__name__, "the connection failed")
