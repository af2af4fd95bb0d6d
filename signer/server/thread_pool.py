"""Threads for slow work of the event loop. The process does not wait for them at its end: a hanging call ends with it.

Results go back to the loop in batches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from signer import vital

_T = TypeVar("_T")


class ThreadPool:
    """At most `size` threads, each started when there is work for it. Used by the thread of one event loop."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._threads = self._unfinished = 0
        self._work: SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]]] = SimpleQueue()
        self._finished: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_woken = False

    def submit(self, work: Callable[[], _T], done: Callable[[_T | Exception], None]) -> None:
        """Run work in a thread; `done` gets its result or exception on the loop."""
        self._unfinished += 1
        self._work.put((work, done))
        if self._threads < min(self._size, self._unfinished):
            self._start_one()

    def prepare(self) -> None:
        """Start all threads, so that none has to be started later."""
        while self._threads < self._size:
            self._start_one()

    def _start_one(self) -> None:
        loop, name = asyncio.get_running_loop(), f"{self._name} {self._threads + 1}"
        try:
            vital.start_thread(name, partial(self._run_thread, loop))
        except RuntimeError as error:  # the system can't create a thread
            if not self._threads:
                vital.end_by(name, error)
                raise
            return
        self._threads += 1

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run work in a thread and wait for it. If cancelled before a thread takes it, it does not run."""
        future = asyncio.get_running_loop().create_future()
        self.submit(lambda: None if future.done() else work(), partial(_settle, future))
        result: _T = await future
        return result

    def _run_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        """Work for ever; runs in each thread."""
        while True:
            work, done = self._work.get()
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - `done` gets the exception
                result = error
            self._finished.append((done, result))
            if not self._is_woken:
                self._is_woken = True
                with suppress(RuntimeError):  # the loop is closed: the result is dropped
                    loop.call_soon_threadsafe(vital.guarded(f"results of {self._name}", self._hand_over))

    def _hand_over(self) -> None:
        self._is_woken = False  # first: a result that arrives from now on wakes the loop again
        while self._finished:
            done, result = self._finished.popleft()
            self._unfinished -= 1
            done(result)


def _settle(future: asyncio.Future[_T], result: _T | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
