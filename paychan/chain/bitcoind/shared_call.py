"""Many callers, one question: what comes while a question is under way goes into the next one, all of it together.

However many strangers ask at once, the node has one request of theirs at a time, and the watcher's own do not wait in line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Generic, TypeVar

from paychan.chain.base import ChainFailed

_K = TypeVar("_K")
_V = TypeVar("_V")


class Gathering(Generic[_K, _V]):
    """Asks `ask` about all keys that wait; a key that is not in its answer has none."""

    def __init__(self, ask: Callable[[Collection[_K]], Awaitable[Mapping[_K, _V]]]) -> None:
        self._ask = ask
        self._keys: dict[_K, None] = {}
        self._answer: asyncio.Future[Mapping[_K, _V]] | None = None
        self._task: asyncio.Task[None] | None = None

    async def answers(self, keys: Collection[_K]) -> dict[_K, _V]:
        """Return what there is for these keys, asked after this call. Raises `ChainFailed`."""
        if not keys:
            return {}
        self._keys.update(dict.fromkeys(keys))
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
        answer = self._answer
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work_off())
        found = await asyncio.shield(answer)
        return {key: found[key] for key in keys if key in found}

    async def close(self) -> None:
        """Ask no more; those who wait hear that the chain failed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ChainFailed("the server ends"))

    async def _work_off(self) -> None:
        while self._answer is not None:
            keys, answer = list(self._keys), self._answer
            self._keys, self._answer = {}, None
            try:
                found = await self._ask(keys)
            except asyncio.CancelledError:
                _fail(answer, ChainFailed("the server ends"))
                raise
            except Exception as error:  # noqa: BLE001 - it belongs to those who asked
                _fail(answer, error)
            else:
                answer.set_result(found)


def _fail(answer: asyncio.Future[Mapping[_K, _V]], error: Exception) -> None:
    answer.set_exception(error)
    answer.exception()  # those who asked may have left
