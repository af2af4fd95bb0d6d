"""Where a request is worked on, and for how long: on the event loop what is small, in threads what can take long.

A small request is judged and signed on the loop, which takes some milliseconds. A large one can take seconds of this
process's time, and a key store any time at all: both are waited for, so that they hold up nobody but those who asked. The two
have threads of their own: a key store that hangs holds up nobody who needs no key.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import structlog

from paychan.protocol.signerwire import FundingRequest, Health, Refusal, Reply, Request, StatusRequest
from signer.handlers import Approved

WORKERS = 16
"""Wait for the key store side by side; more than cores, for what they wait for may be a hardware module."""

LARGE_WORKERS = 2
"""Work on large requests. Python runs one thread at a time: with more of them, the event loop would wait for its turn."""

SMALL_FRAME_BYTES = 2048
"""Up to here a request is worked on at once. The slowest, eight channels that were never seen before, takes 20 ms."""

_KEYLESS = (Health, StatusRequest, FundingRequest)
"""These ask the key store nothing."""

_T = TypeVar("_T")

log = structlog.get_logger()


class Answering(Protocol):
    """What answers requests: see `handlers.Handler`."""

    @property
    def blocking(self) -> bool:
        """Whether it is to be called in a thread, where keys are asked for."""

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        """Answer, or say what to wait for."""

    def finish(self, request: Request, approved: Approved) -> Reply:
        """Answer what was approved."""


class Workplace:
    """Gets every request its reply within a time. A thread that is not done by then goes on, for nobody."""

    def __init__(self, answering: Answering, seconds: float) -> None:
        self._answering = answering
        self._seconds = seconds
        self._waiting = ThreadPoolExecutor(WORKERS, "keys")
        self._writing: tuple[Future[None], asyncio.Future[None]] | None = None
        self._large = ThreadPoolExecutor(LARGE_WORKERS, "large")

    async def reply(self, request: Request, frame_bytes: int, uid: int) -> Reply:
        """Answer a request that came in a frame of this size from this user; whatever happens, there is a reply."""
        place = self._place(request, frame_bytes)
        try:
            async with asyncio.timeout(self._seconds):
                answer = await _run(place, lambda: self._answering.begin(request, uid))
                if not isinstance(answer, Approved):
                    return answer
                approved = answer
                await self._on_disk(approved.durable)
                return await _run(place, lambda: self._answering.finish(request, approved))
        except TimeoutError:
            return Refusal(request.id, "policy-deadline", f"not done within {self._seconds} s")
        except Exception as error:  # noqa: BLE001 - a bug must not take the signer down, nor show what it handled
            tell_bug(error)
            return Refusal(request.id, "protocol-internal", "the signer failed")

    async def _on_disk(self, durable: Future[None]) -> None:
        """Wait until it is done, well or not. Many requests wait for one: the loop is woken once for all of them."""
        if self._writing is None or self._writing[0] is not durable:
            self._writing = durable, asyncio.wrap_future(durable)
        done, _ = await asyncio.wait([self._writing[1]])
        for future in done:
            future.exception()  # seen; `finish` says what it was

    def close(self) -> None:
        """Begin no further work."""
        for place in (self._waiting, self._large):
            place.shutdown(wait=False, cancel_futures=True)

    def _place(self, request: Request, frame_bytes: int) -> Executor | None:
        if self._answering.blocking and not isinstance(request, _KEYLESS):
            return self._waiting
        return self._large if frame_bytes > SMALL_FRAME_BYTES else None


def tell_bug(error: Exception) -> None:
    """Log where a bug is, and nothing of what was handled there."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)


async def _run(place: Executor | None, work: Callable[[], _T]) -> _T:
    return work() if place is None else await asyncio.get_running_loop().run_in_executor(place, work)
