"""The free allowance: the first requests, or the first seconds, of each client address have no price.

It is kept in memory alone: a restart gives each address a new allowance. The table is bounded. When it is full, further
addresses have no allowance until an earlier one's time has passed; so a flood of addresses wins nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import ip_address

from msgspec import Struct

from paychan.gateway.pricefile import FreeAllowance


class _Used(Struct):
    since: float
    requests: int


class Allowance:
    """Counts the free requests of each address."""

    def __init__(self, settings: FreeAllowance) -> None:
        self._settings = settings
        self._used: OrderedDict[str, _Used] = OrderedDict()
        """By address, in the order of `since`."""

    @property
    def exists(self) -> bool:
        """Whether the seller gives any: without one, requests are not counted."""
        return bool(self._settings.requests or self._settings.seconds)

    def takes(self, address: str, now: float) -> bool:
        """Return whether a request of this address is free, and count it if it is.

        Args:
            address: the client's; an IPv6 address counts by its network of 64 bits, which one host has for itself.
            now: seconds of a steady clock.
        """
        if not self.exists:
            return False
        self._forget(now)
        key = _who(address)
        used = self._used.get(key)
        if used is None:
            if len(self._used) >= self._settings.addresses:
                return False
            used = self._used[key] = _Used(now, 0)
        if self._settings.seconds:
            return now - used.since < self._settings.seconds
        if used.requests >= self._settings.requests:
            return False
        used.requests += 1
        return True

    def give_back(self, address: str) -> None:
        """Undo one count, for a free request that got no answer."""
        used = self._used.get(_who(address))
        if used is not None and used.requests:
            used.requests -= 1

    def _forget(self, now: float) -> None:
        ends = now - self._settings.hours * 3600
        while self._used and next(iter(self._used.values())).since <= ends:
            self._used.popitem(last=False)


def _who(address: str) -> str:
    if ":" not in address:
        return address
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 6 and found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return found.packed[:8].hex()
