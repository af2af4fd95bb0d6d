"""The places of a listener's connections: how many there may be, and which one is closed when a further client comes.

When all are taken, connections that wait for their client make room; one for which the server is working does not. Those
go first whose client address holds more than a quarter of all places, then those that never paid, then the rest; among
equals the one that has waited longest. So idle connections keep no payer out, one address cannot take all places, and
behind a proxy, where all connections have one address, the order is by payment and waiting time alone.

A scan looks at all connections, so it closes a share of them at once: under a flood the cost for each newcomer is small.
"""

from __future__ import annotations

import heapq
import ipaddress
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from time import monotonic
from typing import Any, Protocol

from paychan.api.rate_limited_log import RateLimitedLog
from paychan.protocol.errors import PaychanError

_SHARE = 4
"""An address that holds more than one part in four of the places goes first."""

_BATCH = 64
"""One scan frees one part in this many of the places."""

_IDLE_SECONDS = 5.0
"""Where memory, not places, are short, a connection that was used this lately is not closed for a new one."""

WORKING = float("inf")


class SlotHolder(Protocol):
    """A connection, as far as its place goes."""

    network: str
    """Group of its client's address, see `network_of`."""
    paid: bool
    """It has paid or opened a channel, or named a channel's secret."""

    @property
    def waits_since(self) -> float:
        """Monotonic time since which it waits for its client; `WORKING` while it waits for the server."""

    def evict(self) -> None:
        """Close it now. It leaves its place then or soon."""


@lru_cache(4096)
def network_of(address: str) -> str:
    """Group the addresses that one client can use: an IPv4 address, the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = getattr(parsed, "ipv4_mapped", None)
    if mapped is not None:
        return str(mapped)
    if parsed.version == 6:
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)


def network_of_peer(peer: Any) -> str:
    """Do the same for what a socket says of its peer; Unix sockets and closed ones share a group."""
    return network_of(peer[0]) if isinstance(peer, tuple) and peer else ""


class Places:
    """Who is connected to a listener."""

    def __init__(self, limit: int, name: str, memory_problem: Callable[[], PaychanError | None] = lambda: None) -> None:
        """`memory_problem` says why a connection needs the place of another although there are more."""
        self.limit = limit
        self._memory_problem = memory_problem
        self._guests: set[SlotHolder] = set()
        self._held: Counter[str] = Counter()
        self._evicted = RateLimitedLog("all connections are taken, closing those that wait longest", listener=name)
        self._refused = RateLimitedLog("all connections are busy, refusing new ones", listener=name)

    def __len__(self) -> int:
        return len(self._guests)

    def __iter__(self) -> Any:
        return iter(list(self._guests))

    def admit(self, guest: SlotHolder) -> bool:
        """Give a new connection a place, if need be that of others; False: every connection is being worked for.

        A newcomer for which there is no memory takes the place of another, too, if that has been idle for some time.
        """
        is_full = len(self._guests) >= self.limit
        if (is_full and not self.make_room()) or (
            not is_full and self._memory_problem() is not None and not self.make_room(idle_seconds=_IDLE_SECONDS)
        ):
            self._refused.tell(open=len(self._guests))
            return False
        self._guests.add(guest)
        self._held[guest.network] += 1
        return True

    def leave(self, guest: SlotHolder) -> None:
        """Give a place back; a second time changes nothing."""
        if guest not in self._guests:
            return
        self._guests.discard(guest)
        self._held[guest.network] -= 1
        if not self._held[guest.network]:
            del self._held[guest.network]

    def make_room(self, *, paid_too: bool = True, idle_seconds: float = 0) -> int:
        """Close connections that have waited this long for their client; return how many."""
        before = monotonic() - idle_seconds
        most = max(1, self.limit // _SHARE)
        waiting = [
            (self._held[guest.network] <= most, guest.paid, since, id(guest), guest)
            for guest in self._guests
            if (since := guest.waits_since) <= before and (paid_too or not guest.paid)
        ]
        victims = heapq.nsmallest(max(1, self.limit // _BATCH), waiting, key=_rank)
        if victims:
            self._evicted.tell(open=len(self._guests), closed=len(victims))
        for *_, guest in victims:
            self.leave(guest)
            guest.evict()
        return len(victims)


_rank: Callable[[Any], Any] = lambda row: row[:4]  # noqa: E731
