"""Which settlements could not be signed, and since when: while that lasts, coins wait for their channel's expiry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from paychan.protocol.errors import PaychanError, SignerUnavailable, SigningFailed
from paychan.protocol.types import OutPoint

_FORGET_SECONDS = 7200.0
"""A channel whose settlement is no longer tried, since it ended otherwise."""


@dataclass
class Unsigned:
    """Each failed attempt renews an entry, a signed settlement ends it; at most one for each closing channel."""

    steady: Callable[[], float] = monotonic
    _since: dict[OutPoint, tuple[float, float, str]] = field(default_factory=dict)

    def note(self, outpoint: OutPoint, error: PaychanError | None) -> None:
        """Note how an attempt to settle a channel went: what stopped it, or None when it has its settlement."""
        if error is None:
            self._since.pop(outpoint, None)
        elif isinstance(error, SignerUnavailable | SigningFailed):
            now = self.steady()
            self._since[outpoint] = self._since.get(outpoint, (now,))[0], now, str(error)

    def longer_than(self, seconds: float) -> dict[OutPoint, str]:
        """Return the channels that have waited for so long, and why they wait."""
        now = self.steady()
        self._since = {at: entry for at, entry in self._since.items() if now - entry[1] < _FORGET_SECONDS}
        return {at: reason for at, (since, _, reason) in self._since.items() if now - since >= seconds}
