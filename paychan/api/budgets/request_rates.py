"""The rate limit, per client address, of requests that cost work in the signer or the node: terms, outputs, openings.

Each address has a token bucket. The table of buckets is bounded: the address whose last request is oldest is removed,
and later begins again with a full bucket. An IPv6 client controls a /64, so a /64 counts as one address. Behind a proxy
all clients share the address of the proxy, unless `http.trust_forwarded` makes their own addresses known.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

BURST_SECONDS = 10
"""The size of a bucket, in seconds of its rate."""

MOST_ADDRESSES = 10_000
"""Size of the table; an entry takes about 200 bytes."""


class RequestRates:
    """The buckets of all addresses; a rate of 0 requests per second means no limit."""

    def __init__(self, per_second: int, clock: Callable[[], float] = monotonic) -> None:
        self._rate = per_second
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, address: str) -> int:
        """Count a request; return 0 if it is allowed, else after how many whole seconds the next one is."""
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
    """Return the network that an address is counted for."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or ipaddress.IPv6Network((parsed, 64), strict=False))
