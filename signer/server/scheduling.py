"""Where a request is worked on, and for how long: on the event loop what is small, in threads what can take long.

A small request is judged and signed on the loop, which takes some milliseconds. A large one can take seconds of this
process's time, and a key store any time at all to make a key or to sign: all are waited for, so that they hold up nobody but
those who asked. Each has threads of its own, and signatures of a slow key store are waited for on the loop: a key store that
hangs holds up nobody who needs no key.
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
"""Wait for new keys side by side; more than cores, for what they wait for may be a hardware module."""

LARGE_WORKERS = 2
"""Work on large requests. Python runs one thread at a time: with more of them, the event loop would wait for its turn."""

SMALL_FRAME_BYTES = 2048
"""Up to here a request is worked on at once. The slowest, eight channels that were never seen before, takes 20 ms."""

_MAKING_KEYS = (KeyRequest, ReserveRequest)
"""For these a key store may have to make a key; to others it tells at once which it has, and takes its time to sign."""

_Place: TypeAlias = Callable[[Callable[[], Step]], Awaitable[Step]]
"""Where a step is taken: in a thread, or here."""

log = structlog.get_logger()


class RequestHandler(Protocol):
    """What answers requests: see `handlers.Handler`."""

    @property
    def blocking(self) -> bool:
        """Whether keys take long, to make and to sign with."""

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        """Answer, or say what to wait for."""

    def take(self, request: Request, step: Callable[[], Step]) -> Step:
        """Take a step of what was approved."""

    def finish(self, request: Request, approved: Approved) -> Reply:
        """Take all its steps."""


class _Waiting:
    """A quick request that was approved, and waits: for the disk, then perhaps for a slow key store."""

    __slots__ = ("approved", "deadline", "done", "request", "signing")

    def __init__(self, request: Request, approved: Approved, deadline: float, done: Callable[[Reply], None]) -> None:
        self.request = request
        self.approved = approved
        self.deadline = deadline
        self.done = done
        self.signing: asyncio.Task[None] | None = None


class Scheduler:
    """Gets every request its reply within a time. A thread that is not done by then goes on, for nobody."""

    def __init__(self, answering: RequestHandler, seconds: float) -> None:
        self._answering = answering
        self._seconds = seconds
        self._making_keys = ThreadPool(WORKERS, "keys")
        self._large = ThreadPool(LARGE_WORKERS, "large")
        self._on_their_way: dict[Future[None], list[_Waiting]] = {}
        """By what they wait for: many wait for one write, and the loop is woken once for all of them."""
        self._waiting: dict[_Waiting, None] = {}

    def prepare(self) -> None:
        """Start the threads now: later there may be no memory for one."""
        self._large.prepare()
        if self._answering.blocking:
            self._making_keys.prepare()

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
        together = self._on_their_way.get(answer.durable)
        if together is None:
            together = self._on_their_way[answer.durable] = []
            written = vital.guarded("written", self._written)
            answer.durable.add_done_callback(lambda durable: loop.call_soon_threadsafe(written, durable))
        waiting = _Waiting(request, answer, loop.time() + self._seconds, done)
        together.append(waiting)
        self._waiting[waiting] = None

    def end_late(self, now: float) -> None:
        """Refuse what has waited for disk or key store for too long; `now` is the event loop's time."""
        for each in [each for each in self._waiting if each.deadline < now]:
            if each.signing is not None:
                each.signing.cancel()
            self._end(each, self._late(each.request))

    def _written(self, durable: Future[None]) -> None:
        for each in self._on_their_way.pop(durable, []):
            if each not in self._waiting:
                continue  # it was late
            if self._answering.blocking:
                each.signing = asyncio.get_running_loop().create_task(self._sign(each))
            else:
                self._end(each, self._finish(each.request, each.approved))

    def _end(self, waiting: _Waiting, reply: Reply) -> None:
        del self._waiting[waiting]
        waiting.done(reply)

    async def _sign(self, waiting: _Waiting) -> None:
        self._end(waiting, await self._signed(waiting.request, waiting.approved, _at_once))

    async def _signed(self, request: Request, approved: Approved, place: _Place) -> Reply:
        """Take the steps to a reply, each at that place, and wait for a slow key store between them."""
        try:
            step = await place(partial(self._answering.take, request, approved.first))
            while isinstance(step, Wanted):
                following = partial(_following, step, await _signatures(step))
                step = await place(partial(self._answering.take, request, following))
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)
        return step

    def _finish(self, request: Request, approved: Approved) -> Reply:
        try:
            return self._answering.finish(request, approved)
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)

    def _late(self, request: Request) -> Refusal:
        return Refusal(request.id, "policy-deadline", f"not done within {self._seconds} s")

    async def reply(self, request: Request, frame_bytes: int, uid: int) -> Reply:
        """Answer in a thread a request that came in a frame of this size; whatever happens, there is a reply."""
        place = self._place(request, frame_bytes) or self._large
        try:
            async with asyncio.timeout(self._seconds):
                answer = await place.run(lambda: self._answering.begin(request, uid))
                if not isinstance(answer, Approved):
                    return answer
                approved = answer
                await asyncio.wait([asyncio.wrap_future(approved.durable)])
                if self._answering.blocking:
                    return await self._signed(request, approved, place.run)
                return await place.run(lambda: self._answering.finish(request, approved))
        except TimeoutError:
            return self._late(request)
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)

    def _place(self, request: Request, frame_bytes: int) -> ThreadPool | None:
        if self._answering.blocking and isinstance(request, _MAKING_KEYS):
            return self._making_keys
        return self._large if frame_bytes > SMALL_FRAME_BYTES else None


async def _at_once(work: Callable[[], Step]) -> Step:
    return work()


async def _signatures(wanted: Wanted) -> list[asyncio.Future[bytes]]:
    """Have all of it signed, whatever comes of it. What nobody waits for any more is given up."""
    signatures = [cast("SlowKey", key).sign_soon(digest) for key, digest in wanted.digests]  # as `blocking` says
    try:
        await asyncio.wait(signatures)
    finally:
        for signature in signatures:
            if not signature.cancel() and not signature.cancelled():
                signature.exception()  # asked for, so that asyncio does not log what nobody has asked for
    return signatures


def _following(wanted: Wanted, signatures: Sequence[asyncio.Future[bytes]]) -> Step:
    return wanted.then([signature.result() for signature in signatures])


def _failed(request: Request, error: Exception) -> Refusal:
    tell_bug(error)
    return Refusal(request.id, "protocol-internal", "the signer failed")


def tell_bug(error: Exception) -> None:
    """Log where a bug is, and nothing of what was handled there. Without memory the process ends: nothing would go on."""
    if isinstance(error, ExceptionGroup):
        error = (error.subgroup(MemoryError) or error).exceptions[0]
    if isinstance(error, MemoryError):
        vital.end_by("memory", error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)
