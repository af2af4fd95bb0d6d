"""pykka actors on the asyncio event loop instead of one thread each.

pykka's `Actor` is made to be subclassed for another runtime: inbox, future and loop are hooks. Here a message is
handled as soon as it is put into the inbox, on the loop's only thread. A message that arrives while another is being
handled waits for its turn. So an actor costs a few microseconds per message and no thread, and no other code runs
during `on_receive`. `on_receive` must not block; if the answer takes longer, it returns an awaitable.

All of this code runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Generator
from functools import partial
from typing import Any, Self

import pykka
import structlog
from msgspec import Struct
from pykka._future import _Unset
from pykka.messages import ProxyCall, ProxyGetAttr, ProxySetAttr, _ActorStop

log = structlog.get_logger("actors")

_PYKKAS_OWN = frozenset((_ActorStop, ProxyCall, ProxyGetAttr, ProxySetAttr))
"""Messages that pykka answers itself."""


class Told(Struct):
    """A message without a future: it carries its own reply callback, which costs a third of asking an actor."""

    def unhandled(self) -> None:
        """Reply that the actor failed, which is logged, or stopped before it handled this message."""
        raise NotImplementedError


class LoopFuture(pykka.Future[Any]):
    """A pykka future that can be awaited (pykka's own blocks the loop), and set to an awaitable.

    It belongs to one caller: if that caller cancels its wait, an awaitable that other callers share is not cancelled.
    """

    # the attributes of pykka's constructor, which is not called for each message
    _get_hook: Any = None
    _get_hook_result: Any = _Unset()
    _given: Any = None
    _is_set = False
    _waited: asyncio.Future[Any] | None = None

    def __init__(self) -> None:
        """Make only what is needed on one thread."""

    def set(self, value: Any = None) -> None:
        """Set the value, or an awaitable that will return it."""
        if self._is_set:
            return
        if not isinstance(value, asyncio.Future) and hasattr(value, "__await__"):
            value = asyncio.ensure_future(value)
        self._given, self._is_set = value, True
        if self._waited is not None:
            _pass_on(value, self._waited)

    def set_exception(self, exc_info: Any = None) -> None:
        _, error, _ = exc_info or sys.exc_info()
        failed = asyncio.get_running_loop().create_future()
        failed.set_exception(error or RuntimeError("no exception given"))
        self.set(failed)

    def get(self, *, timeout: float | None = None) -> Any:
        """Return a value that is set already; waiting for one would block the loop's thread."""
        if self._get_hook is not None:
            return super().get(timeout=timeout)
        if not self._is_set or (isinstance(self._given, asyncio.Future) and not self._given.done()):
            msg = "waiting would block the event loop: await the future instead"
            raise RuntimeError(msg)
        return self._given.result() if isinstance(self._given, asyncio.Future) else self._given

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait without blocking."""
        if self._get_hook is not None:
            return self.get()
        if self._is_set and not isinstance(self._given, asyncio.Future):
            return self._given
        return (yield from self._wait())

    def _wait(self) -> asyncio.Future[Any]:
        """Make the future that the caller awaits: the given awaitable may be shared with other callers."""
        if self._waited is None:
            self._waited = asyncio.get_running_loop().create_future()
            if self._is_set:
                _pass_on(self._given, self._waited)
        return self._waited


def _pass_on(given: Any, waited: asyncio.Future[Any]) -> None:
    """Pass a value or a future's result on to the caller's future, unless the caller cancelled it."""
    if isinstance(given, asyncio.Future):
        given.add_done_callback(partial(_take, waited))
    elif not waited.done():
        waited.set_result(given)


def _take(waited: asyncio.Future[Any], given: asyncio.Future[Any]) -> None:
    if given.cancelled():
        waited.cancel()
        return
    error = given.exception()
    if waited.done():
        return
    if error is not None:
        waited.set_exception(error)
    else:
        waited.set_result(given.result())


class Envelope(Struct):
    """pykka's Envelope at a tenth of its cost."""

    message: Any
    reply_to: LoopFuture | None = None


class LoopInbox:
    """An actor's inbox: passes each envelope to its actor at once, or in turn while the actor is busy."""

    __slots__ = ("_actor", "_busy", "_waiting")

    def __init__(self) -> None:
        self._actor: LoopActor | None = None
        self._busy = False
        self._waiting: deque[Any] | None = None

    def attach(self, actor: LoopActor) -> None:
        self._actor = actor

    def put(self, item: Any, /) -> None:
        if self._busy or self._actor is None:
            if self._waiting is None:  # exists only while envelopes wait: an empty deque takes 760 bytes
                self._waiting = deque()
            self._waiting.append(item)
            return
        self._busy = True
        try:
            self._actor.handle(item)
            while self._waiting:
                self._actor.handle(self._waiting.popleft())
        finally:
            self._busy = False
            self._waiting = self._waiting or None

    def get(self) -> Any:
        if self._waiting is None:
            raise IndexError
        return self._waiting.popleft()

    def empty(self) -> bool:
        return not self._waiting


class _Flag:
    """The part of `threading.Event` that an actor needs: no caller waits for it, so it has no lock."""

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


class LoopActor(pykka.Actor):
    """An actor whose messages are handled on the event loop.

    An exception in `on_receive` is a bug. The caller gets the exception, and the actor stops, because its state may be
    wrong. The next message starts a new actor from the record in the store.
    """

    actor_inbox: LoopInbox
    alive = True
    """False once the actor has stopped: pykka's `actor_stopped`, without a lock."""
    actor_urn = "urn:paychan:actor"
    """The same for all actors: only their owner identifies them."""

    @property
    def name(self) -> str:
        """Names the actor in the log."""
        return type(self).__name__

    def __init__(self) -> None:
        """Make only what an actor needs on one thread; pykka's lock, reference and name would double its memory."""
        self.actor_inbox = self._create_actor_inbox()
        self.actor_stopped: Any = _Flag()

    @property
    def actor_ref(self) -> pykka.ActorRef[Self]:
        """A reference with pykka's interface; each access makes a new one."""
        return pykka.ActorRef(self)

    @property
    def _actor_ref(self) -> pykka.ActorRef[Self]:  # type: ignore[override]
        return self.actor_ref

    @classmethod
    def launch(cls, *args: Any, **kwargs: Any) -> Self:
        """Start an actor outside pykka's registry, which finds and removes actors by scanning a list."""
        actor = cls(*args, **kwargs)
        actor._start_actor_loop()
        return actor

    def _stop(self) -> None:
        self.alive = False
        super()._stop()

    @staticmethod
    def _create_actor_inbox() -> Any:
        return LoopInbox()

    @staticmethod
    def _create_future() -> LoopFuture:
        return LoopFuture()

    def _start_actor_loop(self) -> None:
        self.actor_inbox.attach(self)
        self._actor_loop_setup()

    def ask(self, message: Any) -> LoopFuture:
        """Put a message into the inbox, as `ActorRef.ask` does. The caller must know that the actor is alive."""
        future = LoopFuture()
        self.actor_inbox.put(Envelope(message, future))
        return future

    def tell(self, message: Told) -> None:
        """Put a message into the inbox that carries its own reply callback."""
        self.actor_inbox.put(Envelope(message))

    def stop(self) -> None:
        """Stop after the messages that came before. A second call has no effect: several writes may have a conflict."""
        if self.alive:
            super().stop()

    def handle(self, envelope: Any) -> None:
        """Process one envelope: pykka's `_actor_loop_running` without its loop."""
        message, reply_to = envelope.message, envelope.reply_to
        if not self.alive:
            _answer_dead(self, message, reply_to)
            return
        try:
            response = self._handle_receive(message) if type(message) in _PYKKAS_OWN else self.on_receive(message)
        except Exception:
            log.exception("actor failed", actor=self.name)
            if reply_to is not None:
                reply_to.set_exception()
            elif isinstance(message, Told):
                message.unhandled()
            self._stop()
            return
        if reply_to is not None:
            reply_to.set(response)
        elif response is not None:
            self._create_future().set(response)  # an awaitable must run even if no caller waits for it


def _answer_dead(actor: LoopActor, message: Any, reply_to: LoopFuture | None) -> None:
    """Answer a message that came after the stop, as pykka promises."""
    error = pykka.ActorDeadError(f"{actor.actor_ref} stopped before handling the message")
    if isinstance(message, Told):
        message.unhandled()
    elif isinstance(message, _ActorStop) and reply_to is not None:
        reply_to.set(None)
    elif reply_to is not None:
        reply_to.set_exception((pykka.ActorDeadError, error, None))
