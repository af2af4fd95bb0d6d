"""Interrupt a coroutine at each of its awaits in turn, by an exception at the point where it would wait."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from types import coroutine
from typing import Any


class Injected(Exception):
    """The exception that a test throws into a task."""


class Crash:
    """Wraps a coroutine function. The `at`-th wait (from 1) within its calls raises, once.

    Without `turns`, bare turns of the loop (`sleep(0)`) do not count: anyio, below httpx, assumes that they cannot
    fail.
    """

    def __init__(self, at: int, error: BaseException | None = None, *, turns: bool = True) -> None:
        self._turns = turns
        self.at = at
        self.waits = 0
        self._error = error or Injected(f"at wait {at}")

    @property
    def happened(self) -> bool:
        return self.waits >= self.at

    def __call__(self, work: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            return await self._drive(work(*args, **kwargs))

        return wrapped

    @coroutine
    def _drive(self, work: Coroutine[Any, Any, Any]) -> Iterator[Any]:
        send, value = work.send, None
        while True:
            try:
                waits_for = send(value)
            except StopIteration as end:
                return end.value
            self.waits += self._turns or waits_for is not None
            if self.waits == self.at and not (waits_for is None and not self._turns):
                send, value = work.throw, self._error
                if hasattr(waits_for, "_asyncio_future_blocking"):
                    waits_for._asyncio_future_blocking = False
                continue
            try:
                send, value = work.send, (yield waits_for)
            except BaseException as error:  # noqa: BLE001 - a cancellation, passed on
                send, value = work.throw, error


def each_wait(most: int = 200) -> Iterator[Crash]:
    """Yield a crash for each wait of the work; end after the first crash that did not happen.

    Use it in a loop that runs the whole scenario once for each crash, and ends the scenario before the next one.
    """
    for at in range(1, most + 1):
        crash = Crash(at)
        yield crash
        if not crash.happened:
            assert at > 1, "the work never awaited"
            return
    msg = f"more than {most} waits"
    raise AssertionError(msg)
