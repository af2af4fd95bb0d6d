"""What refused requests cost the connection that sends them.

A bad signature costs us as much as a good one and an attacker nothing; a request for something that does not exist, or
that is no request, costs more than a payment. So each lets its connection wait for longer, and after some of them the
connection is closed. An honest client never sends any of these in number. Refusals that depend on the state of a channel
or of the chain, and payments that bring nothing, close no connection: an honest client may meet them again and again. They
have a rate, beyond which they wait.

Behind a proxy a connection is not one client's: there each refused request waits, and nothing is closed.
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
_HASTE_SECONDS = 0.5

_FOR_NOTHING, _FOR_NOTHING_A_SECOND = 16, 100
"""Requests for nothing: as many at once as a lost connection leaves without an answer."""


class Penalty:
    """The refused requests of one connection."""

    __slots__ = ("_allowance", "_closes", "_limit", "bad")

    def __init__(self, limit: int, *, closes: bool = True) -> None:
        """`closes` says whether the connection is one client's, and ends at the limit."""
        self._limit, self._closes = limit, closes
        self.bad = 0
        self._allowance: Allowance | None = None

    def refused(self, error: PaychanError) -> float:
        """Count a refusal; return for how many seconds its answer, and all that follows, has to wait.

        Who asks too fast waits too, or each refusal would bring the next question; that is not bad in itself.
        """
        if isinstance(error, TooManyRequests):
            return _HASTE_SECONDS
        return self.bad_signature() if isinstance(error, _COUNTED) else self.for_nothing()

    def for_nothing(self) -> float:
        """Count a request that brought nothing, as `refused` does: beyond their rate each makes its connection wait."""
        now = monotonic()
        self._allowance = self._allowance or Allowance(_FOR_NOTHING, _FOR_NOTHING_A_SECOND, now)
        return self._allowance.wait_seconds(1, _MOST_WAIT_SECONDS, now)

    def paid(self) -> None:
        """Count a payment that brought something: it allows one more that does not."""
        if self._allowance is not None:
            self._allowance.earn(1)

    def bad_signature(self) -> float:
        """Count one, as `refused` does."""
        self.bad += 1
        return float(min(_MOST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** min(self.bad - 1, 16)))

    def problem(self) -> TooManyBadSignatures | None:
        """Return why no request of this connection is looked at any more, or None; then the connection is closed."""
        if self.bad < self._limit or not self._closes:
            return None
        return TooManyBadSignatures(count=self.bad, limit=self._limit)
