"""The expiry of a channel: the lock time from which the client can take the funding back."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from paychan.protocol.errors import ExpiryNotATime
from paychan.protocol.types import UnixTime

MIN_EXPIRY = UnixTime(500_000_000)
"""BIP65: lower lock times are block heights, which RBPCP does not use."""

MAX_EXPIRY = UnixTime(0xFFFFFFFF)
"""nLockTime has 32 bits; a channel with a later expiry could never be refunded."""

BLOCK_SECONDS = 600
"""Mean time between blocks."""


class ChainTime(Protocol):
    """The time and the height of the newest block, by which expiries are judged."""

    @property
    def now(self) -> UnixTime: ...

    @property
    def height(self) -> int | None: ...


class Expiry(Struct, frozen=True, array_like=True):
    """A lock time: Unix time, or block height if it is below `MIN_EXPIRY` (BIP65)."""

    lock_time: int

    @property
    def is_time(self) -> bool:
        """Whether it is a Unix time."""
        return self.lock_time >= MIN_EXPIRY

    @property
    def unix_time(self) -> UnixTime:
        """The Unix time.

        Raises:
            ValueError: it is a block height, which no channel kind uses yet.
        """
        if self.lock_time < MIN_EXPIRY:
            msg = f"the expiry is block height {self.lock_time}, not a time"
            raise ValueError(msg)
        return UnixTime(self.lock_time)

    def left(self, view: ChainTime) -> int:
        """Seconds until the expiry; a negative number after it.

        A height counts `BLOCK_SECONDS` for each block, and as passed if the view knows no height: then the server settles.
        """
        lock_time = self.lock_time
        if lock_time >= MIN_EXPIRY:
            return lock_time - view.now
        return -1 if view.height is None else (lock_time - view.height) * BLOCK_SECONDS

    def is_due(self, view: ChainTime) -> bool:
        """Say whether the next block may contain the refund, if `view.now` is the chain's median time past (BIP113)."""
        if self.is_time:
            return self.lock_time < view.now
        return view.height is not None and self.lock_time <= view.height


def check_expiry(value: int) -> UnixTime:
    """Return an expiry that is a time and fits nLockTime.

    Raises:
        ExpiryNotATime: a block height (below 500,000,000), or more than 32 bits.
    """
    if not MIN_EXPIRY <= value <= MAX_EXPIRY:
        raise ExpiryNotATime(got=value)
    return UnixTime(value)
