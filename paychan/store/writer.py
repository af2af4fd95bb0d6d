"""One thread that does one thing after the other for an event loop, at less cost than an executor's.

`ThreadPoolExecutor` makes a future with a lock of its own for each piece of work and chains it to asyncio's: more than
what encoding a whole group of payments costs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class WriterThread:
    """Runs functions in their order."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Any] = SimpleQueue()
        self._closed = False
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
            self._work.put((loop, done, function, args))
        return await done

    def shutdown(self) -> None:
        """Finish what was given, and end. Blocks; a second call only waits."""
        with self._order:
            if not self._closed:
                self._closed = True
                self._work.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            loop, done, function, args = work
            try:
                value, error = function(*args), None
            except BaseException as raised:  # noqa: BLE001 - whoever waits gets it
                value, error = None, raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(_tell, done, value, error)


def _tell(done: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if done.done():  # nobody waits any more
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(value)
