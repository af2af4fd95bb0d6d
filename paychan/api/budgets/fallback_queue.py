"""Turns for work that costs much more than a payment: requests that Tornado reads, on a detour or with its own connections.

One begins in each turn of the loop, so that however many clients ask for something else, payments get their turn within
about two milliseconds. Of those that wait, each network has its turn after the others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

_AT_ONCE = 1
"""Each costs some 0.4 ms, spread over the turns of the loop that it takes; a payment takes four turns."""


class FallbackQueue:
    """Work that waits for its turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Callable[[], object]]] = OrderedDict()

    def begin(self, network: str, work: Callable[[], object]) -> None:
        """Call `work` in one of the next turns."""
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
