"""Turns of the event loop that all payment streams share, and what a client may send that is no payment.

Whatever streams have sent, reading it takes the loop no longer than one turn's share; what is left waits for the next turn,
and the streams take their turns in the order in which they asked. So a stream that sends a megabyte of tiny frames delays
other clients by that share and no more.
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

    asked: bool
    """Whether it has asked for a turn; `Turns` keeps this."""
    takes_all: bool
    """Whether the rest of the turn is its own, as it works when `work` has returned."""

    def work(self, until: float) -> bool:
        """Work until that monotonic time, at least one step; return whether work is left that can be done now."""


class _Slice:
    """Lets a coroutine go on for one turn."""

    asked, takes_all = False, True

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def work(self, until: float) -> bool:  # noqa: ARG002 - a worker's
        if not self.begun.done():
            self.begun.set_result(None)
        return False


class Turns:
    """Hands out turns, in the order of asking."""

    def __init__(self) -> None:
        self._waiting: deque[Worker] = deque()
        self._scheduled = False

    def ask(self, worker: Worker) -> None:
        """Let a worker work soon."""
        if worker.asked:
            return
        worker.asked = True
        self._waiting.append(worker)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    async def slice(self) -> float:
        """Wait for a turn; return the monotonic time at which another one must be asked for."""
        slice_ = _Slice()
        self.ask(slice_)
        await slice_.begun
        return monotonic() + _SHARE_SECONDS

    def _turn(self) -> None:
        waiting, until = self._waiting, monotonic() + _SHARE_SECONDS
        try:
            while waiting:
                worker = waiting.popleft()
                worker.asked = False
                if worker.work(until):
                    self.ask(worker)
                if worker.takes_all or monotonic() >= until:
                    break
        finally:
            self._scheduled = bool(waiting)
            if waiting:
                asyncio.get_running_loop().call_soon(self._turn)


class Allowance:
    """Frames without a payment that a client may send: so many at once, and so many a second."""

    __slots__ = ("_burst", "_left", "_per_second", "_since")

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst, self._per_second = burst, per_second
        self._left, self._since = burst, now

    def spend(self, count: float, now: float) -> bool:
        """Count frames; False when there are too many."""
        self._left = min(self._burst, self._left + (now - self._since) * self._per_second) - count
        self._since = now
        return self._left >= 0

    def wait_seconds(self, count: float, most_seconds: float, now: float) -> float:
        """Count frames; return after how many seconds there are not too many any more. What is above the most is forgiven."""
        self.spend(count, now)
        self._left = max(self._left, -most_seconds * self._per_second)
        return max(0.0, -self._left / self._per_second)

    def earn(self, count: float) -> None:
        """Allow more, up to the burst, because the client has paid."""
        self._left = min(self._burst, self._left + count)
