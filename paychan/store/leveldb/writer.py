"""One thread that runs functions in order for an event loop, at less cost than an executor.

`ThreadPoolExecutor` creates a future with a lock for each function and chains it to asyncio's: that costs more than
encoding a whole group of payments. And an eventfd wakes the thread, not a lock: Python releases the interpreter while
it writes to an eventfd, so on a busy core the thread can start at once, instead of waking only to wait for the
interpreter.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class WriterThread:
    """Runs functions in the order of the calls."""

    def __init__(self, name: str) -> None:
        self._work: deque[Any] = deque()
        self._wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self.unfinished = 0
        """Number of functions that are not finished, as the loop sees it; includes those whose caller was cancelled."""
        self._order = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a function after all functions passed before.

        Raises:
            RuntimeError: the thread is shut down.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._order:  # no function may be queued after the shutdown
            if self._closed:
                msg = "shut down"
                raise RuntimeError(msg)
            self.unfinished += 1
            self._work.append((loop, done, function, args))
            os.eventfd_write(self._wakeup_fd, 1)
        return await done

    def shutdown(self) -> None:
        """Finish the queued functions and stop the thread. Blocks; a second call only waits."""
        with self._order:
            is_first, self._closed = not self._closed, True
            if is_first:
                os.eventfd_write(self._wakeup_fd, 1)
        self._thread.join()
        if is_first:
            os.close(self._wakeup_fd)  # not by the thread: it may have seen the shutdown before the write above

    def _serve(self) -> None:
        """Run the queue.

        If the loop itself fails, no further function is accepted, and waiting callers get an error.
        """
        try:
            self._run_queue()
        finally:
            self._closed = True
            for loop, done, _, _ in self._work:
                self._answer(loop, done, None, RuntimeError("the thread has ended"))

    def _run_queue(self) -> None:
        while self._work or not self._closed:
            if not self._work:
                os.eventfd_read(self._wakeup_fd)
                continue
            loop, done, function, args = self._work.popleft()
            try:
                value, error = function(*args), None
            except BaseException as raised:  # noqa: BLE001 - the caller receives it
                value, error = None, raised
            self._answer(loop, done, value, error)

    def _answer(self, loop: asyncio.AbstractEventLoop, done: Any, value: Any, error: BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no caller waits
            loop.call_soon_threadsafe(self._deliver, done, value, error)

    def _deliver(self, done: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        self.unfinished -= 1
        if done.done():  # the caller was cancelled
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(value)
