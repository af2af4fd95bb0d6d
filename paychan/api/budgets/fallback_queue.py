"""A queue for requests that Tornado reads, as the fallback of the fast path or on its own connections.

Such a request costs much more than a payment. So at most one begins in `PACE_SECONDS`: payments wait at most about two
milliseconds, and half of the loop's time is left for them, however many of these requests are queued. Client networks
take turns: each begins one request at a time. A single request never waits, nor does a request of a client that has
paid on the same connection.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

PACE_SECONDS = 0.002
"""Time between two requests. Each costs about 0.4 ms, and up to a millisecond on a new connection."""


class FallbackQueue:
    """Queued requests, by client network."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Callable[[], object]]] = OrderedDict()
        self._next_at = 0.0

    def begin(self, network: str, work: Callable[[], object], *, has_paid: bool = False) -> None:
        """Call `work` in a later turn of the loop; the pace is that of connections that have not paid."""
        if has_paid:
            asyncio.get_running_loop().call_soon(work)
            return
        if not self._waiting:
            asyncio.get_running_loop().call_at(self._next_at, self._run)
        self._waiting.setdefault(network, deque()).append(work)

    def _run(self) -> None:
        network, queue = self._waiting.popitem(last=False)
        work = queue.popleft()
        if queue:
            self._waiting[network] = queue
        loop = asyncio.get_running_loop()
        self._next_at = loop.time() + PACE_SECONDS
        if self._waiting:
            loop.call_at(self._next_at, self._run)
        work()
