"""How fast requests may come: policy-rate's other half. Pure; time is an argument.

Each kind of request has a budget of its own, so that no kind uses up what another one needs: strangers cause requests for
keys and nothing else. `Health` and `StatusRequest` have none: to refuse them costs as much as to answer.
"""

from __future__ import annotations

from enum import Enum, auto

from paychan.protocol.wire.signer_messages import (
    Health,
    KeyRequest,
    NewestRequest,
    OtherKeysRequest,
    Request,
    StatusRequest,
)

NEWEST_PER_SECOND = 20
"""Requests to remember newest payments, each of up to 200: far more than a server that is well sends."""

BURST_SECONDS = 10
"""Requests may come faster than they are allowed for so long."""


class Kind(Enum):
    """What a request is for."""

    SETTLING = auto()
    KEYS = auto()
    """Of channels that may never be: asked for on behalf of strangers."""
    NEWEST = auto()
    FREE = auto()


def kind_of(request: Request) -> Kind:
    """Say what a request is for, as far as it tells."""
    match request:
        case Health() | StatusRequest():
            return Kind.FREE
        case KeyRequest(settling=False) | OtherKeysRequest(settling=False):
            return Kind.KEYS
        case NewestRequest():
            return Kind.NEWEST
    return Kind.SETTLING


class Budget:
    """A bucket of requests that fills with time. Seconds are of any clock; one that is set back fills nothing."""

    __slots__ = ("_at", "_left", "_told_at", "rate")

    def __init__(self, requests_per_second: int, now: float) -> None:
        self.rate = requests_per_second
        self._left = float(requests_per_second * BURST_SECONDS)
        self._at = now
        self._told_at = now - 1

    def take(self, now: float) -> bool:
        """Take one request out, if there is one."""
        passed = max(0.0, now - self._at)
        self._left = min(self._left + passed * self.rate, float(self.rate * BURST_SECONDS))
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
