"""Settlements that could not be signed, and since when: their value is at risk when the channel expires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from paychan.protocol.errors import PaychanError, SignerUnavailable, SigningFailed
from paychan.protocol.types import OutPoint

_FORGET_SECONDS = 7200.0
"""Age at which an entry is dropped: its settlement is no longer tried, because the channel ended otherwise."""


@dataclass
class Unsigned:
    """One entry for each closing channel that failed to be signed: each failure renews it, a signature removes it."""

    steady: Callable[[], float] = monotonic
    _since: dict[OutPoint, tuple[float, float, str]] = field(default_factory=dict)

    def note(self, outpoint: OutPoint, error: PaychanError | None) -> None:
        """Record the result of an attempt to settle a channel: its error, or None if the settlement is signed."""
        if error is None:
            self._since.pop(outpoint, None)
        elif isinstance(error, SignerUnavailable | SigningFailed):
            now = self.steady()
            self._since[outpoint] = self._since.get(outpoint, (now,))[0], now, str(error)

    def longer_than(self, seconds: float) -> dict[OutPoint, str]:
        """Return the channels that have waited at least this time, with the reason."""
        now = self.steady()
        self._since = {at: entry for at, entry in self._since.items() if now - entry[1] < _FORGET_SECONDS}
        return {at: reason for at, (since, _, reason) in self._since.items() if now - since >= seconds}
