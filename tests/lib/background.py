"""An event loop in a thread: tests without a loop of their own, and tests that must not wait, run coroutines on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from functools import cache
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="background loop", daemon=True).start()
    return loop


def run(begin: Callable[_P, Awaitable[_T]], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Call a function on the loop, and return the result of what it returns. Not for calls from the loop itself."""

    async def awaited() -> _T:
        return await begin(*arguments, **named)

    return asyncio.run_coroutine_threadsafe(awaited(), _loop()).result()
