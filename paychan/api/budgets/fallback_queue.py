"""A queue for requests that Tornado reads, as the fallback of the fast path or on its own connections.

Such a request costs much more than a payment. One begins in each turn of the event loop, so that payments wait at most
about two milliseconds, however many of these requests are queued. Client networks take turns: each begins one request
at a time.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

_AT_ONCE = 1
"""Requests begun in one turn. Each costs about 0.4 ms, spread over several turns; a payment takes four turns."""


class FallbackQueue:
    """Queued requests, by client network."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Callable[[], object]]] = OrderedDict()

    def begin(self, network: str, work: Callable[[], object]) -> None:
        """Call `work` in a later turn of the loop."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._run)
        self._waiting.setdefault(network, deque()).append(work)

    def _run(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._waiting:
                return
            network, queue = self._waiting.popitem(last=False)
            work = queue.popleft()
            if queue:
                self._waiting[network] = queue
            work()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run)
