"""pykka actors on the asyncio event loop instead of one thread each.

pykka's `Actor` is made to be subclassed for another runtime: inbox, future and loop are hooks. Here a message is
handled as soon as it is put into the inbox, on the loop's only thread; a message that arrives while another is being
handled waits for its turn. So an actor costs a few microseconds per message and no thread, and within `on_receive`
nothing else runs. `on_receive` must not block; when the answer takes longer it returns an awaitable.

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections import deque
from collections.abc import Generator
from typing import Any, Self

import pykka
import structlog
from pykka.messages import _ActorStop

log = structlog.get_logger("actors")


class LoopFuture(pykka.Future[Any]):
    """A pykka future that can be awaited (pykka's own blocks the loop), and set to an awaitable.

    It is its asker's own: cancelling the wait for it does not touch what others may wait for too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def set(self, value: Any = None) -> None:
        """Set the value, or what will give it."""
        if inspect.isawaitable(value):
            asyncio.ensure_future(value).add_done_callback(self._take)
        elif not self._result.done():
            self._result.set_result(value)

    def set_exception(self, exc_info: Any = None) -> None:
        _, error, _ = exc_info or sys.exc_info()
        if not self._result.done():
            self._result.set_exception(error or RuntimeError("no exception given"))

    def get(self, *, timeout: float | None = None) -> Any:
        """Return a value that is already there; nobody may wait for one on the loop's thread."""
        if self._get_hook is not None:
            return super().get(timeout=timeout)
        if not self._result.done():
            msg = "waiting would block the event loop: await the future instead"
            raise RuntimeError(msg)
        return self._result.result()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait without blocking."""
        if self._get_hook is not None:
            return self.get()
        return (yield from self._result)

    def _take(self, given: asyncio.Future[Any]) -> None:
        """Pass on what an awaitable gave, unless the asker has left."""
        if given.cancelled():
            self._result.cancel()
            return
        error = given.exception()
        if self._result.done():
            return
        if error is not None:
            self._result.set_exception(error)
        else:
            self._result.set_result(given.result())


class LoopInbox:
    """An actor's inbox: hands each envelope to its actor at once, or in turn."""

    __slots__ = ("_actor", "_busy", "_waiting")

    def __init__(self) -> None:
        self._actor: LoopActor | None = None
        self._busy = False
        self._waiting: deque[Any] = deque()

    def attach(self, actor: LoopActor) -> None:
        self._actor = actor

    def put(self, item: Any, /) -> None:
        self._waiting.append(item)
        if self._busy or self._actor is None:
            return
        self._busy = True
        try:
            while self._waiting:
                self._actor.handle(self._waiting.popleft())
        finally:
            self._busy = False

    def get(self) -> Any:
        return self._waiting.popleft()

    def empty(self) -> bool:
        return not self._waiting


class LoopActor(pykka.Actor):
    """An actor whose messages are handled on the event loop.

    An exception in `on_receive` is a bug: the asker gets it, and the actor dies, because its memory may be wrong; the
    store has the truth, and the next message wakes a new actor from there.
    """

    actor_inbox: LoopInbox

    @classmethod
    def launch(cls, *args: Any, **kwargs: Any) -> Self:
        """Start an actor that only its owner knows: pykka's own registry finds and removes by scanning a list."""
        actor = cls(*args, **kwargs)
        actor._start_actor_loop()
        return actor

    @property
    def alive(self) -> bool:
        return not self.actor_stopped.is_set()

    @staticmethod
    def _create_actor_inbox() -> Any:
        return LoopInbox()

    @staticmethod
    def _create_future() -> LoopFuture:
        return LoopFuture()

    def _start_actor_loop(self) -> None:
        self.actor_inbox.attach(self)
        self._actor_loop_setup()

    def stop(self) -> None:
        """Stop behind the messages that came before. A second time is nothing: several may find that it must go."""
        if self.alive:
            super().stop()

    def handle(self, envelope: Any) -> None:
        """Process one envelope: pykka's `_actor_loop_running` without its loop."""
        if self.actor_stopped.is_set():
            _answer_dead(self, envelope)
            return
        try:
            response = self._handle_receive(envelope.message)
        except Exception:
            log.exception("actor failed", actor=str(self))
            if envelope.reply_to is not None:
                envelope.reply_to.set_exception()
            self._stop()
            return
        reply_to = envelope.reply_to or self._create_future()  # an awaitable must run, also if nobody waits for it
        reply_to.set(response)


def _answer_dead(actor: LoopActor, envelope: Any) -> None:
    """A message that came after the stop is answered, as pykka promises."""
    if envelope.reply_to is None:
        return
    if isinstance(envelope.message, _ActorStop):
        envelope.reply_to.set(None)
        return
    error = pykka.ActorDeadError(f"{actor.actor_ref} stopped before handling the message")
    envelope.reply_to.set_exception((pykka.ActorDeadError, error, None))
