"""Where a request is worked on, and for how long: on the event loop what is small, in threads what can take long.

A small request is judged and signed on the loop, which takes some milliseconds. A large one can take seconds of this
process's time, and a key store any time at all to make a key or to sign: both are waited for, so that they hold up nobody but
those who asked. The two have threads of their own: a key store that hangs holds up nobody who needs no key.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import structlog

from paychan.protocol.signerwire import KeyRequest, Refusal, Reply, Request, ReserveRequest
from signer.handlers import Approved

WORKERS = 16
"""Wait for the key store side by side; more than cores, for what they wait for may be a hardware module."""

LARGE_WORKERS = 2
"""Work on large requests. Python runs one thread at a time: with more of them, the event loop would wait for its turn."""

SMALL_FRAME_BYTES = 2048
"""Up to here a request is worked on at once. The slowest, eight channels that were never seen before, takes 20 ms."""

_MAKING_KEYS = (KeyRequest, ReserveRequest)
"""For these a key store may have to make a key; to others it tells at once which it has, and takes its time to sign."""

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


class _Waiting:
    """A request that was approved, and waits for the disk."""

    __slots__ = ("approved", "deadline", "done", "request")

    def __init__(self, request: Request, approved: Approved, deadline: float, done: Callable[[Reply], None]) -> None:
        self.request = request
        self.approved = approved
        self.deadline = deadline
        self.done = done


class Workplace:
    """Gets every request its reply within a time. A thread that is not done by then goes on, for nobody."""

    def __init__(self, answering: Answering, seconds: float) -> None:
        self._answering = answering
        self._seconds = seconds
        self._waiting = ThreadPoolExecutor(WORKERS, "keys")
        self._on_their_way: dict[Future[None], list[_Waiting]] = {}
        """By what they wait for: many wait for one write, and the loop is woken once for all of them."""
        self._signing: set[asyncio.Task[None]] = set()
        self._large = ThreadPoolExecutor(LARGE_WORKERS, "large")

    def is_quick(self, request: Request, frame_bytes: int) -> bool:
        """Say whether a request that came in a frame of this size is worked on at once (`answer`), or in a thread."""
        return self._place(request, frame_bytes) is None

    def answer(self, request: Request, uid: int, done: Callable[[Reply], None]) -> None:
        """Answer a quick request of this user: `done` gets the reply, perhaps once something is on disk."""
        try:
            answer = self._answering.begin(request, uid)
        except Exception as error:  # noqa: BLE001 - a bug must not take the signer down, nor show what it handled
            done(_failed(request, error))
            return
        if not isinstance(answer, Approved):
            done(answer)
            return
        loop = asyncio.get_running_loop()
        waiting = self._on_their_way.get(answer.durable)
        if waiting is None:
            waiting = self._on_their_way[answer.durable] = []
            answer.durable.add_done_callback(lambda durable: loop.call_soon_threadsafe(self._written, durable))
        waiting.append(_Waiting(request, answer, loop.time() + self._seconds, done))

    def end_late(self, now: float) -> None:
        """Refuse what waits for the disk for too long; `now` is the event loop's time."""
        for durable, waiting in self._on_their_way.items():
            late = [each for each in waiting if each.deadline < now]
            self._on_their_way[durable] = [each for each in waiting if each.deadline >= now]
            for each in late:
                each.done(self._late(each.request))

    def _written(self, durable: Future[None]) -> None:
        for each in self._on_their_way.pop(durable, []):
            if self._answering.blocking:
                task = asyncio.get_running_loop().create_task(self._sign(each))
                self._signing.add(task)
                task.add_done_callback(self._signing.discard)
                continue
            try:
                reply = self._answering.finish(each.request, each.approved)
            except Exception as error:  # noqa: BLE001
                reply = _failed(each.request, error)
            each.done(reply)

    async def _sign(self, each: _Waiting) -> None:
        """Have a key store sign that takes its time."""
        try:
            async with asyncio.timeout_at(each.deadline):
                reply = await _run(self._waiting, lambda: self._answering.finish(each.request, each.approved))
        except TimeoutError:
            reply = self._late(each.request)
        except Exception as error:  # noqa: BLE001
            reply = _failed(each.request, error)
        each.done(reply)

    def _late(self, request: Request) -> Refusal:
        return Refusal(request.id, "policy-deadline", f"not done within {self._seconds} s")

    async def reply(self, request: Request, frame_bytes: int, uid: int) -> Reply:
        """Answer in a thread a request that came in a frame of this size; whatever happens, there is a reply."""
        place = self._place(request, frame_bytes)
        try:
            async with asyncio.timeout(self._seconds):
                answer = await _run(place, lambda: self._answering.begin(request, uid))
                if not isinstance(answer, Approved):
                    return answer
                approved = answer
                await asyncio.wait([asyncio.wrap_future(approved.durable)])
                place = self._waiting if self._answering.blocking else place
                return await _run(place, lambda: self._answering.finish(request, approved))
        except TimeoutError:
            return self._late(request)
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)

    def close(self) -> None:
        """Begin no further work."""
        for place in (self._waiting, self._large):
            place.shutdown(wait=False, cancel_futures=True)

    def _place(self, request: Request, frame_bytes: int) -> Executor | None:
        if self._answering.blocking and isinstance(request, _MAKING_KEYS):
            return self._waiting
        return self._large if frame_bytes > SMALL_FRAME_BYTES else None


def _failed(request: Request, error: Exception) -> Refusal:
    tell_bug(error)
    return Refusal(request.id, "protocol-internal", "the signer failed")


def tell_bug(error: Exception) -> None:
    """Log where a bug is, and nothing of what was handled there."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)


async def _run(place: Executor | None, work: Callable[[], _T]) -> _T:
    return work() if place is None else await asyncio.get_running_loop().run_in_executor(place, work)
