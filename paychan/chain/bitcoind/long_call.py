"""A question to the node that may take hours: it goes on when its caller's patience ends, and all who ask share it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from paychan.chain.base import ChainFailed


class Errand:
    """Runs one coroutine at a time, under a name that tells callers what goes on."""

    def __init__(self, name: str, patience_seconds: float) -> None:
        self._name = name
        self._patience = patience_seconds
        self._task: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin the work unless it goes on already, and wait for its end.

        Raises:
            ChainFailed: it goes on longer than the patience; ask again. And whatever the work raises.
        """
        if self._task is None:
            self._task = asyncio.create_task(work())
            self._task.add_done_callback(self._ended)
        task = self._task
        await asyncio.wait([task], timeout=self._patience)
        if not task.done():
            msg = f"{self._name}; ask again"
            raise ChainFailed(msg)
        task.result()

    async def close(self) -> None:
        """Stop waiting. The node finishes what it began."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # for the case that its callers have left
