"""The slots of a listener's connections: their number, and which connections are closed when a new client needs a slot.

If all slots are in use, connections that are idle (they wait for their client) are closed. A connection for which the
server is working is never closed. First come connections of an address that holds more than a quarter of all slots,
then connections that never paid, then the rest; within each group the connection that has been idle longest comes
first. So idle connections keep no payer out, and one address cannot take all slots. Behind a proxy all connections have
one address, and only payment and idle time count.

A scan looks at all connections. So it closes a share of them at once, which keeps the cost per new client small in a
flood.
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
from paychan.protocol.errors import PaychanError, TooManyConnections

_SHARE = 4
"""The connections of an address that holds more than 1/4 of the slots are closed first."""

_BATCH = 64
"""One scan frees 1/64 of the slots."""

_IDLE_SECONDS = 5.0
"""If memory is short but slots are free, only connections that have been idle for this time are closed."""

WORKING = float("inf")


class SlotHolder(Protocol):
    """A connection as its slot sees it."""

    network: str
    """Group of its client's address, see `network_of`."""
    paid: bool
    """Whether it has paid, opened a channel, or named a channel's secret."""

    @property
    def idle_since(self) -> float:
        """Monotonic time since which it waits for its client; `WORKING` while the server works for it."""

    def evict(self) -> None:
        """Close it now. Its slot is freed at once or soon after."""


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
    """Group a socket's peer address as `network_of` does; Unix sockets and closed sockets share one group."""
    return network_of(peer[0]) if isinstance(peer, tuple) and peer else ""


class ConnectionSlots:
    """The connections of one listener."""

    def __init__(
        self,
        limit: int,
        name: str,
        memory_problem: Callable[[], PaychanError | None] = lambda: None,
        full: PaychanError | None = None,
    ) -> None:
        """`memory_problem` returns why a new connection must replace another although slots are free, or None.

        `full` refuses connections for which no slot is free; by default `TooManyConnections`.
        """
        self.limit = limit
        self._full = full or TooManyConnections()
        self._memory_problem = memory_problem
        self._holders: set[SlotHolder] = set()
        self._held: Counter[str] = Counter()
        self._evicted = RateLimitedLog("all connection slots are in use, closing those idle longest", listener=name)
        self._refused = RateLimitedLog("all connections are busy, refusing new ones", listener=name)

    def __len__(self) -> int:
        return len(self._holders)

    def __iter__(self) -> Any:
        return iter(list(self._holders))

    def admit(self, holder: SlotHolder) -> bool:
        """Give a new connection a slot; return False if there is none.

        If all slots are in use, or memory is short, idle connections are closed first. Without an idle one the new
        connection gets no slot.
        """
        is_full = len(self._holders) >= self.limit
        if (is_full and not self.make_room()) or (
            not is_full and self._memory_problem() is not None and not self.make_room(idle_seconds=_IDLE_SECONDS)
        ):
            self._refused.warning(open=len(self._holders))
            return False
        self._holders.add(holder)
        self._held[holder.network] += 1
        return True

    def refusal(self) -> PaychanError:
        """Return why the last new connection got no slot."""
        problem = self._memory_problem() if len(self._holders) < self.limit else None
        return problem or self._full

    def leave(self, holder: SlotHolder) -> None:
        """Free a connection's slot; a second call does nothing."""
        if holder not in self._holders:
            return
        self._holders.discard(holder)
        self._held[holder.network] -= 1
        if not self._held[holder.network]:
            del self._held[holder.network]

    def make_room(self, *, paid_too: bool = True, idle_seconds: float = 0) -> int:
        """Close connections that have been idle for `idle_seconds`; return how many.

        `paid_too`: also those that have paid.
        """
        before = monotonic() - idle_seconds
        most = max(1, self.limit // _SHARE)
        waiting = [
            (self._held[holder.network] <= most, holder.paid, since, id(holder), holder)
            for holder in self._holders
            if (since := holder.idle_since) <= before and (paid_too or not holder.paid)
        ]
        victims = heapq.nsmallest(max(1, self.limit // _BATCH), waiting, key=_rank)
        if victims:
            self._evicted.warning(open=len(self._holders), closed=len(victims))
        for *_, holder in victims:
            self.leave(holder)
            holder.evict()
        return len(victims)


_rank: Callable[[Any], Any] = lambda row: row[:4]  # noqa: E731
