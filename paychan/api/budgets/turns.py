"""Turns of the event loop that all payment streams share, and the allowance for frames without a payment.

In one turn of the loop, reading all streams takes at most `_SHARE_SECONDS`. Unread data waits for the next turn, and
streams are served in the order in which they were queued. So a stream that sends a megabyte of tiny frames delays other
clients by at most that share.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import Protocol

_SHARE_SECONDS = 0.001
"""Time for all streams in one turn of the loop."""


class Worker(Protocol):
    """Something that works in turns."""

    is_queued: bool
    """Whether it is queued for a turn; `Turns` sets this."""
    ends_turn: bool
    """Whether no other worker may work in this turn, because this one continues after `work` has returned."""

    def work(self, until: float) -> bool:
        """Work until the monotonic time `until`, at least one step; return whether it has more work that is ready."""


class _Slice:
    """Lets a coroutine continue for one turn."""

    is_queued, ends_turn = False, True

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def work(self, until: float) -> bool:  # noqa: ARG002 - part of `Worker`
        if not self.begun.done():
            self.begun.set_result(None)
        return False


class Turns:
    """Serves workers in the order in which they were queued."""

    def __init__(self) -> None:
        self._waiting: deque[Worker] = deque()
        self._scheduled = False

    def schedule(self, worker: Worker) -> None:
        """Queue a worker, unless it is queued."""
        if worker.is_queued:
            return
        worker.is_queued = True
        self._waiting.append(worker)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    async def slice(self) -> float:
        """Wait for a turn.

        Return the monotonic time until which the caller may work before it must wait for another.
        """
        slice_ = _Slice()
        self.schedule(slice_)
        await slice_.begun
        return monotonic() + _SHARE_SECONDS

    def _turn(self) -> None:
        waiting, until = self._waiting, monotonic() + _SHARE_SECONDS
        try:
            while waiting:
                worker = waiting.popleft()
                worker.is_queued = False
                if worker.work(until):
                    self.schedule(worker)
                if worker.ends_turn or monotonic() >= until:
                    break
        finally:
            self._scheduled = bool(waiting)
            if waiting:
                asyncio.get_running_loop().call_soon(self._turn)


class Allowance:
    """A token bucket: a client may send `burst` items at once, and `per_second` in each second."""

    __slots__ = ("_burst", "_left", "_per_second", "_since")

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst, self._per_second = burst, per_second
        self._left, self._since = burst, now

    def spend(self, count: float, now: float) -> bool:
        """Count items at the monotonic time `now`; return False if they exceed the allowance."""
        self._left = min(self._burst, self._left + (now - self._since) * self._per_second) - count
        self._since = now
        return self._left >= 0

    def wait_seconds(self, count: float, most_seconds: float, now: float) -> float:
        """Count items; return the seconds until they are within the allowance, at most `most_seconds`.

        The excess is forgiven.
        """
        self.spend(count, now)
        self._left = max(self._left, -most_seconds * self._per_second)
        return max(0.0, -self._left / self._per_second)

    def earn(self, count: float) -> None:
        """Allow `count` more items, up to the burst, because the client has paid."""
        self._left = min(self._burst, self._left + count)
