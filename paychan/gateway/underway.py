"""Requests that are being served, so that one charge pays for one delivery.

A repeated request is not charged again (`credit`). Here is decided whether it is served: not while the first is still
being served, and after an answer has left a few times only. A repetition can't take back what the first delivery cost.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from msgspec import Struct

from paychan.protocol.charges import Delivery
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.unpaid import AlreadyDelivered, RequestUnderWay

Key: TypeAlias = tuple[OutPoint, bytes]
"""Channel and id of a request."""

_MOST_KEPT = 50_000
"""Requests that are remembered, about 300 bytes each; the oldest are forgotten first."""


class _Known(Struct):
    visit: str
    until: float
    """Monotonic time at which the program that serves the request is given up; 0: it is served no more."""
    charged_sat: Sat
    """Charge of the present or last delivery."""
    final_sat: Sat = Sat(0)
    """Sum that earlier deliveries cost."""
    deliveries: int = 0


class UnderWay:
    """Decides which charged requests are served.

    Args:
        lease_seconds: a program that has neither finished nor released a request by then is given up.
        repeats: how often a delivered request is served again.
    """

    def __init__(self, lease_seconds: float, repeats: int) -> None:
        self._lease_seconds, self._repeats = lease_seconds, repeats
        self._known: OrderedDict[Key, _Known] = OrderedDict()

    def begin(
        self, key: Key, visit: str, charged_sat: Sat, before: Delivery | None, now: float
    ) -> RequestUnderWay | AlreadyDelivered | None:
        """Return why a charged request is not to be served, or note that it is.

        Args:
            key: the request.
            visit: the program's id of this try; the same try is served once, however often it is charged.
            charged_sat: charge of the request now.
            before: what the record knew of the request before this charge.
            now: monotonic time.
        """
        known = self._known.get(key)
        if known is None:
            is_done = before is not None and before.is_done
            final_sat = before.charged_sat if before is not None and is_done else Sat(0)
            known = self._known[key] = _Known("", 0, charged_sat, final_sat, int(is_done))
            while len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)
        if now < known.until and (not visit or visit != known.visit):
            return RequestUnderWay()
        if known.deliveries > self._repeats:
            return AlreadyDelivered(got=known.deliveries, limit=self._repeats + 1)
        known.visit, known.until, known.charged_sat = visit, now + self._lease_seconds, charged_sat
        self._known.move_to_end(key)
        return None

    def least_sat(self, key: Key) -> Sat:
        """Return the sum below which a release of a request that is being served can't lower its charge."""
        known = self._known.get(key)
        return known.final_sat if known is not None and known.until else Sat(0)

    def lowered(self, key: Key, charged_sat: Sat, *, is_over: bool) -> None:
        """Note a released charge; `is_over` says that the request is served no more, and nothing was delivered."""
        known = self._known.get(key)
        if known is None:
            return
        known.charged_sat = charged_sat
        if is_over:
            known.until = 0
            if not known.deliveries:
                del self._known[key]

    def done(self, key: Key) -> None:
        """Note that the answer has begun to leave."""
        known = self._known.get(key)
        if known is not None and known.until:
            known.until, known.deliveries = 0, known.deliveries + 1
            known.final_sat = max(known.final_sat, known.charged_sat)
