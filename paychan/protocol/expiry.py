"""The expiry of a channel: the lock time from which the client can take the funding back."""

from __future__ import annotations

from paychan.protocol.errors import ExpiryNotATime
from paychan.protocol.types import UnixTime

MIN_EXPIRY = UnixTime(500_000_000)
"""BIP65: lower lock times are block heights, which RBPCP does not use."""

MAX_EXPIRY = UnixTime(0xFFFFFFFF)
"""nLockTime has 32 bits; a channel with a later expiry could never be refunded."""


def check_expiry(value: int) -> UnixTime:
    """Return an expiry that is a time and fits nLockTime.

    Raises:
        ExpiryNotATime: a block height (below 500,000,000), or more than 32 bits.
    """
    if not MIN_EXPIRY <= value <= MAX_EXPIRY:
        raise ExpiryNotATime(got=value)
    return UnixTime(value)
