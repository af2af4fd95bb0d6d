"""One thread that does one thing after the other for an event loop, at less cost than an executor's.

`ThreadPoolExecutor` makes a future with a lock of its own for each piece of work and chains it to asyncio's: more than
what encoding a whole group of payments costs. And the thread is woken by an eventfd, not by a lock: Python lets go of the
interpreter while it writes to one, so on a busy core the thread that wakes up can begin at once, instead of waking up
only to wait for the interpreter.
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
    """Runs functions in their order."""

    def __init__(self, name: str) -> None:
        self._work: deque[Any] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self.unfinished = 0
        """How many were given that are not done, as the loop sees it; also those that nobody waits for any more."""
        self._order = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a function behind those that were given before.

        Raises:
            RuntimeError: it is shut down.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._order:  # nothing may stand behind the end
            if self._closed:
                msg = "shut down"
                raise RuntimeError(msg)
            self.unfinished += 1
            self._work.append((loop, done, function, args))
            os.eventfd_write(self._bell, 1)
        return await done

    def shutdown(self) -> None:
        """Finish what was given, and end. Blocks; a second call only waits."""
        with self._order:
            is_first, self._closed = not self._closed, True
            if is_first:
                os.eventfd_write(self._bell, 1)
        self._thread.join()
        if is_first:
            os.close(self._bell)  # not by the thread, which may have seen the end before it was rung

    def _serve(self) -> None:
        """Work; should that ever fail outside of what was given, nothing more is taken, and callers hear so."""
        try:
            self._work_off()
        finally:
            self._closed = True
            for loop, done, _, _ in self._work:
                self._answer(loop, done, None, RuntimeError("the thread has ended"))

    def _work_off(self) -> None:
        while self._work or not self._closed:
            if not self._work:
                os.eventfd_read(self._bell)
                continue
            loop, done, function, args = self._work.popleft()
            try:
                value, error = function(*args), None
            except BaseException as raised:  # noqa: BLE001 - whoever waits gets it
                value, error = None, raised
            self._answer(loop, done, value, error)

    def _answer(self, loop: asyncio.AbstractEventLoop, done: Any, value: Any, error: BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed, and so nothing waits
            loop.call_soon_threadsafe(self._tell, done, value, error)

    def _tell(self, done: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        self.unfinished -= 1
        if done.done():  # nobody waits any more
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(value)
