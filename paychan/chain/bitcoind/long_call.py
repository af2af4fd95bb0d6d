"""A call to the node that may take hours: it continues after a caller's patience ends, and concurrent callers share it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from paychan.chain.base import ChainFailed


class LongCall:
    """Runs one coroutine at a time, under a name for error messages."""

    def __init__(self, name: str, patience_seconds: float) -> None:
        self._name = name
        self._patience = patience_seconds
        self._task: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start the work unless it is already running, and wait for its end.

        Raises:
            ChainFailed: the work takes longer than the patience; call again. Also what the work raises.
        """
        if self._task is None:
            self._task = asyncio.create_task(work())
            self._task.add_done_callback(self._ended)
        task = self._task
        await asyncio.wait([task], timeout=self._patience)
        if not task.done():
            msg = f"{self._name}; try again"
            raise ChainFailed(msg)
        task.result()

    async def close(self) -> None:
        """Stop waiting. The node finishes the call."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # marks the exception as read, in case no caller waits any longer
