"""Many callers share one request: keys that arrive while a request is in flight go into the next one together.

So the requests of all clients together need one connection to the node, and the watcher's requests don't queue behind
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Generic, TypeVar

from paychan.chain.base import ChainFailed

_K = TypeVar("_K")
_V = TypeVar("_V")


class SharedCall(Generic[_K, _V]):
    """Calls `ask` with all waiting keys; a key that is missing in the answer has no value."""

    def __init__(self, ask: Callable[[Collection[_K]], Awaitable[Mapping[_K, _V]]]) -> None:
        self._ask = ask
        self._keys: dict[_K, None] = {}
        self._answer: asyncio.Future[Mapping[_K, _V]] | None = None
        self._task: asyncio.Task[None] | None = None

    async def answers(self, keys: Collection[_K]) -> dict[_K, _V]:
        """Return the values of these keys, read after this call. Raises `ChainFailed`."""
        if not keys:
            return {}
        self._keys.update(dict.fromkeys(keys))
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
        answer = self._answer
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_queue())
        found = await asyncio.shield(answer)
        return {key: found[key] for key in keys if key in found}

    async def close(self) -> None:
        """Send no further request; waiting callers get `ChainFailed`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ChainFailed("the server is stopping"))

    async def _run_queue(self) -> None:
        while self._answer is not None:
            keys, answer = list(self._keys), self._answer
            self._keys, self._answer = {}, None
            try:
                found = await self._ask(keys)
            except asyncio.CancelledError:
                _fail(answer, ChainFailed("the server is stopping"))
                raise
            except Exception as error:  # noqa: BLE001 - the waiting callers receive it
                _fail(answer, error)
            else:
                answer.set_result(found)


def _fail(answer: asyncio.Future[Mapping[_K, _V]], error: Exception) -> None:
    answer.set_exception(error)
    answer.exception()  # marks the exception as read: the callers may have left
