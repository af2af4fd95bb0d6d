"""The budget of a program: the most that it may pay, to which hosts, and when to ask. It is pure.

A host is the `host:port` of the URL that the program requests. A redirect is a request of its own, so the budget judges its
host anew. Prices of offers are only compared with limits; no answer of a server raises a limit or lowers a sum.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from msgspec import Struct

from paychan.client.amounts import satoshi
from paychan.client.errors import Declined, HostNotAllowed, OverBudget

PORTS = {"http": 80, "https": 443}


class Question(Struct, frozen=True):
    """A payment for `approve` to allow."""

    host: str
    """`host:port`, as requested."""
    method: str
    url: str
    price_sat: int


class Sums(Struct, frozen=True):
    """Sums that the wallet has spent, in satoshi: to one host, on one day (UTC), and in all."""

    host_sat: int = 0
    day_sat: int = 0
    total_sat: int = 0


Approve = Callable[[Question], bool | Awaitable[bool]]


class Budget:
    """Limits in satoshi; None is no limit. A wallet's log counts what all programs of the wallet spend.

    Args:
        per_request: highest price of one request.
        per_host: highest sum for one `host:port`.
        per_day: highest sum for one day (UTC).
        total: highest sum of the wallet's log.
        hosts: the hosts that may be paid: `host:port`, or `host` for the ports 80 and 443; None allows all.
        approve: asked for each payment above `approve_above`; True allows it. It may be a coroutine function for
            asynchronous clients.
        approve_above: highest price that needs no question.

    Raises:
        WrongNumber, TermsUnacceptable: a limit is no amount in satoshi.
        ValueError: no limit is set.
    """

    __slots__ = ("approve", "approve_above", "hosts", "per_day", "per_host", "per_request", "total")

    def __init__(
        self,
        per_request: int | None = None,
        per_host: int | None = None,
        per_day: int | None = None,
        total: int | None = None,
        *,
        hosts: Iterable[str] | None = None,
        approve: Approve | None = None,
        approve_above: int = 0,
    ) -> None:
        limits = {"per_request": per_request, "per_host": per_host, "per_day": per_day, "total": total}
        if all(limit is None for limit in limits.values()):
            msg = "a budget without a limit: set one of per_request, per_host, per_day and total"
            raise ValueError(msg)
        if isinstance(hosts, str):
            msg = f"hosts is the text {hosts!r}: want a list of texts"
            raise TypeError(msg)
        for name, limit in {**limits, "approve_above": approve_above}.items():
            setattr(self, name, None if limit is None else satoshi(limit, name))
        self.hosts = None if hosts is None else frozenset(spelled for host in hosts for spelled in _spellings(host))
        self.approve = approve

    per_request: int | None
    per_host: int | None
    per_day: int | None
    total: int | None
    approve_above: int

    def problem(self, host: str, price_sat: int, spent: Sums, paid_before_sat: int = 0) -> Declined | None:
        """Return why the budget does not cover a request, or None.

        Args:
            host: `host:port`.
            price_sat: price that the offer names.
            spent: sums so far.
            paid_before_sat: part of the price that `spent` has already, since an earlier try of this request counted it.
        """
        if self.hosts is not None and host not in self.hosts:
            return HostNotAllowed(host=host, price_sat=price_sat, hosts=", ".join(sorted(self.hosts)) or "none")
        for name, limit_sat, spent_sat in (
            ("per_request", self.per_request, paid_before_sat),
            ("per_host", self.per_host, spent.host_sat),
            ("per_day", self.per_day, spent.day_sat),
            ("total", self.total, spent.total_sat),
        ):
            if limit_sat is not None and spent_sat + price_sat - paid_before_sat > limit_sat:
                return OverBudget(
                    limit=name,
                    host=host,
                    price_sat=price_sat,
                    limit_sat=limit_sat,
                    spent_sat=spent_sat,
                    left_sat=max(0, limit_sat - spent_sat),
                )
        return None

    def asks(self, price_sat: int) -> bool:
        """Say whether `approve` must allow a payment of this price."""
        return self.approve is not None and price_sat > self.approve_above


def host_of(scheme: str, host: str, port: int | None) -> str:
    """Return `host:port` of a request, from the parts that the HTTP library connects to.

    Raises:
        ValueError: a scheme without a port, and no port.
    """
    name = host.lower().rstrip(".").strip("[]")
    number = port or PORTS.get(scheme.lower())
    if not name or not number:
        msg = f"a URL of scheme {scheme!r} with host {host!r} and port {port}: want http or https, and a host"
        raise ValueError(msg)
    return f"[{name}]:{number}" if ":" in name else f"{name}:{number}"


def _spellings(host: str) -> tuple[str, ...]:
    """Return the `host:port` that an entry of `hosts` names."""
    if "/" in host or "@" in host or not host.strip():
        msg = f"host {host!r} of a budget: want host or host:port"
        raise ValueError(msg)
    name, colon, port = host.rpartition(":")
    if colon and port.isascii() and port.isdigit() and (":" not in name or name.endswith("]")):
        return (host_of("", name, int(port)),)
    return tuple(host_of(scheme, host, None) for scheme in PORTS)
