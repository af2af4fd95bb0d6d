"""How fast one client address may ask what costs signer or node something: terms, funding outputs, openings.

A bucket for each address, in a bounded table: the address that asked longest ago makes room, and begins anew with a full
bucket. An IPv6 client has a whole /64 to itself, so that is one address here. Behind a proxy all clients share its address
unless `http.trust_forwarded` lets their own be known.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

BURST_SECONDS = 10
"""What is not used is saved up for this long."""

MOST_ADDRESSES = 10_000
"""About 200 bytes each."""


class RequestRates:
    """The buckets of all addresses; 0 questions a second means: as many as they like."""

    def __init__(self, per_second: int, clock: Callable[[], float] = monotonic) -> None:
        self._rate = per_second
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, address: str) -> int:
        """Count a question; return 0, or after how many whole seconds the next one is answered."""
        if not self._rate:
            return 0
        name, now, full = _network(address), self._clock(), float(self._rate * BURST_SECONDS)
        left, at = self._buckets.get(name, (full, now))
        left = min(full, left + (now - at) * self._rate)
        allowed = left >= 1
        self._buckets[name] = (left - 1 if allowed else left, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > MOST_ADDRESSES:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) / self._rate))


def _network(address: str) -> str:
    """Whom an address belongs to."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or ipaddress.IPv6Network((parsed, 64), strict=False))
