"""What strangers may read of a refusal that comes from inside, and what the log keeps of it.

Reasons of the signer, the node or the disk name sockets, URLs and limits. A client gets a neutral text, the code, and an
incident number; the log has the reason beside that number. Refusals with one reason within a minute share a number and a
line, so a flood of them does not fill the log.
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
"""Numbers in a minute. Further reasons share the newest."""


class Incidents:
    """The numbers of the last minute."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, str, str]] = deque()

    def number(self, error: PaychanError) -> str:
        """Return the number under which the log explains this refusal."""
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


def told_to_strangers(error: PaychanError) -> tuple[str, dict[str, Any]]:
    """Return text and fields of a refusal as any client may read them."""
    if not error.public_text:
        return str(error), error.fields
    number = _incidents.number(error)
    return f"{error.public_text} (incident {number})", {"incident": number}
