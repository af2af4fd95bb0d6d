"""The penalty of a connection for refused requests: delays that grow, and in the end a close.

A bad signature costs the server as much as a good one, and costs an attacker nothing. A malformed request, or a request
for an unknown resource, costs more than a payment. So each of these delays its connection longer than the one before;
at the limit the connection is closed. An honest client never sends many of these. Refusals that depend on the state of
a channel or of the chain, and payments of no value, never close a connection, because an honest client may cause them
repeatedly. They have a rate limit; above it they are delayed.

Behind a proxy a connection carries requests of several clients. There refused requests are delayed, and none closes the
connection.
"""

from __future__ import annotations

from time import monotonic

from paychan.api.budgets.turns import Allowance
from paychan.protocol.errors import (
    BadSignature,
    BodyTooLarge,
    Malformed,
    MethodNotAllowed,
    Missing,
    NotFound,
    PaychanError,
    Repeated,
    SignatureEncoding,
    TooManyBadSignatures,
    TooManyRequests,
    Unauthorized,
)

_COUNTED = (
    BadSignature,
    BodyTooLarge,
    Malformed,
    MethodNotAllowed,
    Missing,
    NotFound,
    Repeated,
    SignatureEncoding,
    Unauthorized,
)

_FIRST_WAIT_SECONDS = 0.01
_MOST_WAIT_SECONDS = 1.0
_RATE_LIMITED_SECONDS = 0.5

_NO_VALUE_BURST, _NO_VALUE_A_SECOND = 16, 100
"""Requests of no value: a burst, then a number per second. The burst is what a client sends again after a lost
connection."""


class Penalty:
    """The refused requests of one connection."""

    __slots__ = ("_closes", "_limit", "allowance", "bad")

    def __init__(self, limit: int, *, closes: bool = True) -> None:
        """`limit`: bad requests after which the connection is closed.

        `closes` is False behind a proxy, where it stays open.
        """
        self._limit, self._closes = limit, closes
        self.bad = 0
        self.allowance: Allowance | None = None
        """Requests of no value that are left; None: there was none yet."""

    def refused(self, error: PaychanError) -> float:
        """Count a refusal; return the delay of its answer, and of all later requests, in seconds.

        `TooManyRequests` is delayed too, or the client would repeat its request at once; it does not count as a bad
        request.
        """
        if isinstance(error, TooManyRequests):
            return _RATE_LIMITED_SECONDS
        return self.bad_signature() if isinstance(error, _COUNTED) else self.no_value()

    def no_value(self) -> float:
        """Count a request of no value.

        Return its delay in seconds, which is above 0 once the rate limit is exceeded.
        """
        now = monotonic()
        self.allowance = self.allowance or Allowance(_NO_VALUE_BURST, _NO_VALUE_A_SECOND, now)
        return self.allowance.wait_seconds(1, _MOST_WAIT_SECONDS, now)

    def paid(self) -> None:
        """Count a payment of some value: it allows one more request of no value."""
        if self.allowance is not None:
            self.allowance.earn(1)

    def bad_signature(self) -> float:
        """Count a bad request; return its delay in seconds."""
        self.bad += 1
        return float(min(_MOST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** min(self.bad - 1, 16)))

    def problem(self) -> TooManyBadSignatures | None:
        """Return the refusal for every further request, after which the connection is closed; None below the limit."""
        if self.bad < self._limit or not self._closes:
            return None
        return TooManyBadSignatures(count=self.bad, limit=self._limit)
