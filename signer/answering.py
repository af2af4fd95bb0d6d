"""Where a request is worked on, and for how long: on the event loop what is small, in threads what can take long.

A small request is judged and signed on the loop, which takes some milliseconds. A large one can take seconds of this
process's time, and a key store any time at all to make a key or to sign: all are waited for, so that they hold up nobody but
those who asked. Each has threads of its own: a key store that hangs holds up nobody who needs no key.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Protocol

import structlog

from paychan.protocol.signerwire import KeyRequest, Refusal, Reply, Request, ReserveRequest
from signer.crew import Crew
from signer.handlers import Approved

WORKERS = 16
"""Wait for new keys side by side; more than cores, for what they wait for may be a hardware module."""

LARGE_WORKERS = 2
"""Work on large requests. Python runs one thread at a time: with more of them, the event loop would wait for its turn."""

SMALL_FRAME_BYTES = 2048
"""Up to here a request is worked on at once. The slowest, eight channels that were never seen before, takes 20 ms."""

_MAKING_KEYS = (KeyRequest, ReserveRequest)
"""For these a key store may have to make a key; to others it tells at once which it has, and takes its time to sign."""

log = structlog.get_logger()


class Answering(Protocol):
    """What answers requests: see `handlers.Handler`."""

    @property
    def blocking(self) -> bool:
        """Whether it is to be called in a thread, where keys are asked for."""

    @property
    def side_by_side(self) -> int:
        """How many signatures the key store makes at a time, if it is one that takes long."""

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:
        """Answer, or say what to wait for."""

    def finish(self, request: Request, approved: Approved) -> Reply:
        """Answer what was approved."""


class _Waiting:
    """A request that was approved, and waits: for the disk, then perhaps for the key store."""

    __slots__ = ("approved", "deadline", "done", "is_over", "request")

    def __init__(self, request: Request, approved: Approved, deadline: float, done: Callable[[Reply], None]) -> None:
        self.request = request
        self.approved = approved
        self.deadline = deadline
        self.done = done
        self.is_over = False
        """It has its reply: what a key store says of it later is nobody's."""

    def end(self, reply: Reply) -> None:
        """Give the reply, unless there was one."""
        if not self.is_over:
            self.is_over = True
            self.done(reply)


class Workplace:
    """Gets every request its reply within a time. A thread that is not done by then goes on, for nobody."""

    def __init__(self, answering: Answering, seconds: float) -> None:
        self._answering = answering
        self._seconds = seconds
        self._making_keys = Crew(WORKERS, "keys")
        self._large = Crew(LARGE_WORKERS, "large")
        self._signing = Crew(answering.side_by_side, "signing")
        self._on_their_way: dict[Future[None], list[_Waiting]] = {}
        """By what they wait for: many wait for one write, and the loop is woken once for all of them."""
        self._in_signing: dict[_Waiting, None] = {}

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
        """Refuse what has waited for disk or key store for too long; `now` is the event loop's time."""
        for waiting in (*self._on_their_way.values(), list(self._in_signing)):
            for each in waiting:
                if each.deadline < now:
                    each.end(self._late(each.request))

    def _written(self, durable: Future[None]) -> None:
        for each in self._on_their_way.pop(durable, []):
            if each.is_over:
                continue
            if each.approved.takes_keys and self._answering.blocking:
                self._in_signing[each] = None
                self._signing.submit(partial(self._finish, each), partial(self._signed, each))
            else:
                each.end(self._finish(each))

    def _finish(self, each: _Waiting) -> Reply:
        """Sign, unless nobody waits for it any more: then the reply is nobody's."""
        if each.is_over:
            return self._late(each.request)
        try:
            return self._answering.finish(each.request, each.approved)
        except Exception as error:  # noqa: BLE001
            return _failed(each.request, error)

    def _signed(self, each: _Waiting, reply: Reply | Exception) -> None:
        del self._in_signing[each]
        each.end(reply if not isinstance(reply, Exception) else _failed(each.request, reply))

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
                place = self._signing if self._answering.blocking and approved.takes_keys else place
                return await place.run(lambda: self._answering.finish(request, approved))
        except TimeoutError:
            return self._late(request)
        except Exception as error:  # noqa: BLE001
            return _failed(request, error)

    def _place(self, request: Request, frame_bytes: int) -> Crew | None:
        if self._answering.blocking and isinstance(request, _MAKING_KEYS):
            return self._making_keys
        return self._large if frame_bytes > SMALL_FRAME_BYTES else None


def _failed(request: Request, error: Exception) -> Refusal:
    tell_bug(error)
    return Refusal(request.id, "protocol-internal", "the signer failed")


def tell_bug(error: Exception) -> None:
    """Log where a bug is, and nothing of what was handled there."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.error("bug", kind=type(error).__name__, file=where.filename, line=where.lineno)
