"""How fast requests may come: policy-rate's other half, which concerns them all. Pure; time is an argument."""

from __future__ import annotations

BURST_SECONDS = 10
"""Requests may come faster than they are allowed for so long."""


class Budget:
    """A bucket of requests that fills with time. Seconds are of any clock; one that is set back fills nothing."""

    __slots__ = ("_at", "_left", "_rate", "_told_at")

    def __init__(self, requests_per_second: int, now: float) -> None:
        self._rate = requests_per_second
        self._left = float(requests_per_second * BURST_SECONDS)
        self._at = now
        self._told_at = now - 1

    def take(self, now: float) -> bool:
        """Take one request out, if there is one."""
        passed = max(0.0, now - self._at)
        self._left = min(self._left + passed * self._rate, float(self._rate * BURST_SECONDS))
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def may_tell(self, now: float) -> bool:
        """Say whether a refusal is to be logged: one a second, or the flood would go on in the log."""
        if 0 <= now - self._told_at < 1:
            return False
        self._told_at = now
        return True
