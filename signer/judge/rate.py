"""Rate limits of requests: the other half of policy-rate. Pure; time is an argument.

Each kind of request has a separate budget, so that no kind uses up the budget of another: strangers can cause key
requests and nothing else. `Health` and `StatusRequest` have none: a refusal costs as much as an answer.
"""

from __future__ import annotations

from enum import Enum, auto

from paychan.protocol.wire.signer_messages import (
    CertificateRequest,
    Health,
    KeyRequest,
    NewestRequest,
    OtherKeysRequest,
    Request,
    StatusRequest,
)

NEWEST_PER_SECOND = 20
"""Requests to record newest payments, each of up to 200: far more than an intact server sends."""

CERTIFICATES_PER_HOUR = 60
"""Certificates of receipt keys, of which a server needs one at its start and then one a week."""

BURST_SECONDS = 10
"""A burst above the limit may last this time."""


class Kind(Enum):
    """The purpose of a request."""

    SETTLING = auto()
    KEYS = auto()
    """Keys of channels that may never be opened: requested on behalf of strangers."""
    NEWEST = auto()
    CERTIFICATE = auto()
    FREE = auto()


def kind_of(request: Request) -> Kind:
    """Return the purpose of a request, as it states it."""
    match request:
        case Health() | StatusRequest():
            return Kind.FREE
        case KeyRequest(settling=False) | OtherKeysRequest(settling=False):
            return Kind.KEYS
        case NewestRequest():
            return Kind.NEWEST
        case CertificateRequest():
            return Kind.CERTIFICATE
    return Kind.SETTLING


class Budget:
    """A token bucket. Seconds are of any clock; a clock that is set back adds no tokens."""

    __slots__ = ("_at", "_left", "_most", "_per_second", "_told_at", "period", "rate")

    def __init__(self, most: int, now: float, *, per_hour: bool = False) -> None:
        """Allow `most` requests per second, on average over ten seconds; or `per_hour`, on average over an hour."""
        self.rate, self.period = most, "hour" if per_hour else "second"
        self._per_second = most / 3600 if per_hour else most
        self._most = float(most if per_hour else most * BURST_SECONDS)
        self._left = self._most
        self._at = now
        self._told_at = now - 1

    def take(self, now: float) -> bool:
        """Take one token, if there is one."""
        passed = max(0.0, now - self._at)
        self._left = min(self._left + passed * self._per_second, self._most)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def may_tell(self, now: float) -> bool:
        """Say whether to log a refusal: one per second, or the flood would continue in the log."""
        if 0 <= now - self._told_at < 1:
            return False
        self._told_at = now
        return True
