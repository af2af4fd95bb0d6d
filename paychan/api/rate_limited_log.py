"""A log line for an event that may happen thousands of times a second: written at most once a minute, with a count."""

from __future__ import annotations

from time import monotonic
from typing import Any

import structlog

log = structlog.get_logger("access")

_SECONDS = 60.0


class RateLimitedLog:
    """One kind of event."""

    def __init__(self, event: str, **fields: Any) -> None:
        self._event, self._fields = event, fields
        self._next_at = float("-inf")
        self._unwritten = 0

    def warning(self, **fields: Any) -> None:
        """Count the event; write it unless the last line is less than a minute old."""
        self._unwritten += 1
        now = monotonic()
        if now < self._next_at:
            return
        log.warning(self._event, **self._fields, **fields, times=self._unwritten)
        self._next_at, self._unwritten = now + _SECONDS, 0
