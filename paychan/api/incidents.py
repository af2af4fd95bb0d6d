"""Refusals whose reason must stay inside the server: a neutral text for the client, the full reason for the log.

Reasons from the signer, the node or the disk name sockets, URLs and limits. A client gets a neutral text, the code, and
an incident number. The log has the reason and the same number. Within a minute, refusals with the same reason share one
number and one log line, so that a flood of them does not fill the log.
"""

from __future__ import annotations

import secrets
from collections import deque
from time import monotonic
from typing import Any

import structlog

from paychan.protocol.errors import PaychanError

log = structlog.get_logger("api")

_SECONDS = 60.0
_MOST = 16
"""Incident numbers in one minute. Further reasons share the newest number."""


class Incidents:
    """The incident numbers of the last minute."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, str, str]] = deque()

    def number(self, error: PaychanError) -> str:
        """Return the incident number of this refusal; a new number is logged with the reason."""
        now, text = monotonic(), f"{error.code}: {error}"
        while self._recent and self._recent[0][0] < now - _SECONDS:
            self._recent.popleft()
        for _, known, number in self._recent:
            if known == text:
                return number
        if len(self._recent) >= _MOST:
            return self._recent[-1][2]
        number = secrets.token_hex(4)
        self._recent.append((now, text, number))
        log.warning("refused", incident=number, code=error.code, reason=str(error))
        return number


_incidents = Incidents()


def public_text_and_fields(error: PaychanError) -> tuple[str, dict[str, Any]]:
    """Return the text and fields of a refusal without anything that only the operator may read."""
    if not error.public_text:
        return str(error), error.fields
    number = _incidents.number(error)
    return f"{error.public_text} (incident {number})", {"incident": number}
