"""Place and time limit of each request: small ones run on the event loop, slow ones in threads.

A small request is judged and signed on the loop, which takes some milliseconds. A large one can take seconds of this
process's time, and a key store may take any time to make a key or to sign. These run in separate thread pools, so that
they delay only their own callers. The loop awaits the signatures of a slow key store: a key store that hangs does not
delay requests that need no key.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol, TypeAlias, cast

import structlog

from paychan.protocol.wire.signer_messages import KeyRequest, Refusal, Reply, Request, ReserveRequest
from signer import vital
from signer.judge.handler import Approved, Step, Wanted
from signer.keys.ring import SlowKey
from signer.server.thread_pool import ThreadPool

WORKERS = 16
"""Threads that wait for new keys at the same time; more than cores, because a hardware module may do the work."""

LARGE_WORKERS = 2
"""Threads for large requests. Python runs one thread at a time: more of them would delay the event loop."""

SMALL_FRAME_BYTES = 2048
"""Requests up to this size run on the loop. The slowest, eight channels that were never seen before, takes 20 ms."""

_MAKING_KEYS = (KeyRequest, ReserveRequest)
"""Requests for which a key store may have to make a key. For others only signing is slow."""

_Place: TypeAlias = Callable[[Callable[[], Step]], Awaitable[Step]]
"""Runs a step, in a thread or on the loop."""

log = structlog.get_logger()


class RequestHandler(Protocol):
    """Answers requests: see `handler.Handler`."""

    @property
    def blocking(self) -> bool:
        """Whether making keys and signing can take long."""

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        """Answer, or return the approval and the write to wait for."""

    def take(self, request: Request, step: Callable[[], Step]) -> Step:
        """Run one step of an approved request."""

    def finish(self, request: Request, approved: Approved) -> Reply:
        """Run all steps of an approved request."""


class _Waiting:
    """A quick, approved request that waits for the disk, then perhaps for a slow key store."""

    __slots__ = ("approved", "deadline", "done", "request", "signing")

    def __init__(self, request: Request, approved: Approved, deadline: float, done: Callable[[Reply], None]) -> None:
        self.request = request
        self.approved = approved
        self.deadline = deadline
        self.done = done
        self.signing: asyncio.Task[None] | None = None


class Scheduler:
    """Gives every request a reply within the time limit. The result of a later thread is dropped."""

    def __init__(self, handler: RequestHandler, seconds: float) -> None:
        self._handler = handler
        self._seconds = seconds
        self._making_keys = ThreadPool(WORKERS, "keys")
        self._large = ThreadPool(LARGE_WORKERS, "large")
        self._on_their_way: dict[Future[None], list[_Waiting]] = {}
        """Requests by the write that they wait for: the loop is woken once for all requests of a write."""
        self._waiting: dict[_Waiting, None] = {}

    def prepare(self) -> None:
        """Start the threads now: later there may be no memory for one."""
        self._large.prepare()
        if self._handler.blocking:
            self._making_keys.prepare()

    def is_quick(self, request: Request, frame_bytes: int) -> bool:
        """Say whether a request in a frame of this size runs on the loop (`answer`), or in a thread (`reply`)."""
        return self._place(request, frame_bytes) is None

    def answer(self, request: Request, uid: int, done: Callable[[Reply], None]) -> None:
        """Answer a quick request of this user: `done` gets the reply, after the disk write if there is one."""
        try:
            answer = self._handler.begin(request, uid)
        except Exception as error:  # noqa: BLE001 - a bug must neither end the signer nor show request data
            done(_failed(request, error))
            return
        if not isinstance(answer, Approved):
            done(answer)
            return
        loop = asyncio.get_running_loop()
        together = self._on_their_way.get(answer.durable)
        if together is None:
            together = self._on_their_way[answer.durable] = []
            written = vital.guarded("written", self._written)
            answer.durable.add_done_callback(lambda durable: loop.call_soon_threadsafe(written, durable))
        waiting = _Waiting(request, answer, loop.time() + self._seconds, done)
        together.append(waiting)
        self._waiting[waiting] = None

    def end_late(self, now: float) -> None:
        """Refuse requests that have waited for disk or key store too long; `now` is the event loop's time."""
        for each in [each for each in self._waiting if each.deadline < now]:
            if each.signing is not None:
                each.signing.cancel()
            self._end(each, self._late(each.request))

    def _written(self, durable: Future[None]) -> None:
        for each in self._on_their_way.pop(durable, []):
            if each not in self._waiting:
                continue  # it was late, and was refused
            if self._handler.blocking:
                each.signing = asyncio.get_running_loop().create_task(self._sign(each))
            else:
                self._end(each, self._finish(each.request, each.approved))

    def _end(self, waiting: _Waiting, reply: Reply) -> None:
        del self._waiting[waiting]
        waiting.done(reply)

    async def _sign(self, waiting: _Waiting) -> None:
        self._end(waiting, await self._signed(waiting.request, waiting.approved, _at_once))

    async def _signed(self, request: Request, approved: Approved, place: _Place) -> Reply:
        """Run the steps to a reply, each at that place, and wait for a slow key store between them."""
        try:
            step = await place(partial(self._handler.take, request, approved.first))
            while isinstance(step, Wanted):
                following = partial(_following, step, await _signatures(step))
                step = await place(partial(self._handler.take, request, following))
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)
        return step

    def _finish(self, request: Request, approved: Approved) -> Reply:
        try:
            return self._handler.finish(request, approved)
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)

    def _late(self, request: Request) -> Refusal:
        return Refusal(request.id, "policy-deadline", f"not done within {self._seconds} s")

    async def reply(self, request: Request, frame_bytes: int, uid: int) -> Reply:
        """Answer a request in a frame of this size in a thread; return a reply in every case, also after an error."""
        place = self._place(request, frame_bytes) or self._large
        try:
            async with asyncio.timeout(self._seconds):
                answer = await place.run(lambda: self._handler.begin(request, uid))
                if not isinstance(answer, Approved):
                    return answer
                approved = answer
                await asyncio.wait([asyncio.wrap_future(approved.durable)])
                if self._handler.blocking:
                    return await self._signed(request, approved, place.run)
                return await place.run(lambda: self._handler.finish(request, approved))
        except TimeoutError:
            return self._late(request)
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)

    def _place(self, request: Request, frame_bytes: int) -> ThreadPool | None:
        if self._handler.blocking and isinstance(request, _MAKING_KEYS):
            return self._making_keys
        return self._large if frame_bytes > SMALL_FRAME_BYTES else None


async def _at_once(work: Callable[[], Step]) -> Step:
    return work()


async def _signatures(wanted: Wanted) -> list[asyncio.Future[bytes]]:
    """Start all signatures and wait for all, even after an error. Cancellation cancels those not begun."""
    signatures = [cast("SlowKey", key).sign_soon(digest) for key, digest in wanted.digests]  # `blocking` implies it
    try:
        await asyncio.wait(signatures)
    finally:
        for signature in signatures:
            if not signature.cancel() and not signature.cancelled():
                signature.exception()  # retrieved, so that asyncio does not log it as unhandled
    return signatures


def _following(wanted: Wanted, signatures: Sequence[asyncio.Future[bytes]]) -> Step:
    return wanted.then([signature.result() for signature in signatures])


def _failed(request: Request, error: Exception) -> Refusal:
    tell_bug(error)
    return Refusal(request.id, "protocol-internal", "the signer failed")


def tell_bug(error: Exception) -> None:
    """Log the place of a bug, without the data handled there. Lack of memory ends the process."""
    if isinstance(error, ExceptionGroup):
        error = (error.subgroup(MemoryError) or error).exceptions[0]
    if isinstance(error, MemoryError):
        vital.end_by("memory", error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)
