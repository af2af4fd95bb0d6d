"""What bad signatures cost the connection that sends them.

A check costs us as much as it costs a good payer, and an attacker nothing: so each bad signature lets its connection wait
for longer, and after so many of them no more is checked. An honest client never sends one.
"""

from __future__ import annotations

from paychan.protocol.errors import TooManyBadSignatures

_FIRST_WAIT_SECONDS = 0.01
_MOST_WAIT_SECONDS = 1.0


class Manners:
    """The bad signatures of one connection."""

    __slots__ = ("_limit", "bad")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.bad = 0

    def bad_signature(self) -> float:
        """Count one; return for how many seconds its answer, and all that follows, has to wait."""
        self.bad += 1
        return float(min(_MOST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** (self.bad - 1)))

    def problem(self) -> TooManyBadSignatures | None:
        """Return why no payment of this connection is looked at any more, or None; then the connection is closed."""
        if self.bad < self._limit:
            return None
        return TooManyBadSignatures(count=self.bad, limit=self._limit)
