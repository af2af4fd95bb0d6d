"""Messages about a channel's life, delivered to the application from the store: at least once, in order per channel.

A message is written together with the record that it tells about, so a kill loses none, and leaves the store only when
the application has acknowledged it. Strangers can't grow the store by messages: a channel has them once it has paid, one
for each part of its life, and one more for each reorganization that takes its end back.

One message is in flight at a time, on a task of its own: payments and settlements never wait for it. When the application
does not answer at all, everything pauses; when it refuses one message, only that channel pauses. Pauses double.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from actors.observing import ChannelChanged, Event
from paychan.callback.base import ApplicationSilent, MessageRefused
from paychan.callback.messages import Event as Told
from paychan.callback.messages import events, events_again
from paychan.protocol.channel import Channel
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.rbpcp import encode_json
from paychan.store.base import Message, Store
from paychan.supervisor import Supervised

log = structlog.get_logger("application")

OUTBOX_PATIENCE_SECONDS = 600.0
"""A longer time without a delivery or an attempt means that the task hangs."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_PAGE = 100
_MOST_PAUSED = 1000
"""Most channels that pause apart; with more of them the application itself is at fault, and everything pauses."""


class Receiver(Protocol):
    """Delivers a message, see `callback.http`."""

    async def tell(self, message_id: str, body: bytes) -> None:
        """Raise `MessageRefused` or `ApplicationSilent` if the message is not acknowledged."""


class _Named(Struct, frozen=True):
    idempotency_key: str


class _Pause(Struct, frozen=True):
    seconds: float
    until: float
    """Time of `monotonic`."""
    since: float
    """Time of `monotonic` at the first failure."""
    reason: str

    @property
    def is_over(self) -> bool:
        return monotonic() >= self.until


class Outbox:
    """Makes the messages that the store writes, and delivers those that wait in it. An observer of channels."""

    events: frozenset[type[Event]] = frozenset({ChannelChanged})

    def __init__(self, store: Store, receiver: Receiver, clock: Callable[[], UnixTime]) -> None:
        self._store, self._receiver, self._clock = store, receiver, clock
        self._news = asyncio.Event()
        self._silent: _Pause | None = None
        self._task: Supervised | None = None
        self._failed: Message | None = None
        """The message that the application met with silence."""
        self._refused: dict[OutPoint, _Pause] = {}

    def announce(self, before: Channel | None, after: Channel) -> list[bytes]:
        """Return the messages about a change, for the store; a bug in them must not stop the write of a record."""
        return _encoded(lambda: events(before, after, self._clock()), after)

    def observe(self, event: Event) -> None:  # noqa: ARG002 - the store has the message
        """Wake the task: a message may wait."""
        self._news.set()

    def refused_for(self, seconds: float) -> dict[OutPoint, str]:
        """Return the channels whose next message the application has refused for this time, with the last reasons."""
        before = monotonic() - seconds
        return {outpoint: pause.reason for outpoint, pause in self._refused.items() if pause.since <= before}

    async def run(self, task: Supervised) -> None:
        """Deliver messages as long as the server runs."""
        self._task = task
        while True:
            self._news.clear()
            if self._silent is None or self._silent.is_over:
                await self._deliver_all()
            task.succeeded()
            await self._pause()

    async def _pause(self) -> None:
        """Wait for news, or for the end of the next pause; while the application is silent, news change nothing."""
        pauses = [self._silent] if self._silent else [*self._refused.values()]
        wait = min((pause.until - monotonic() for pause in pauses), default=_LONGEST_PAUSE_SECONDS)
        wait = max(0.0, min(wait, _LONGEST_PAUSE_SECONDS))
        if self._silent:
            await asyncio.sleep(wait)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), wait)

    async def _deliver_all(self) -> None:
        """Try every waiting message, first those behind the one that met silence: it may be its own fault."""
        failed, self._failed = self._failed, None
        if failed is not None and not await self._deliver_from(failed.key, failed.outpoint):
            return
        if await self._deliver_from(b""):
            self._silent = None

    async def _deliver_from(self, after: bytes, left_out: OutPoint | None = None) -> bool:
        """Try the messages behind a key; return false when the application is silent."""
        while page := await self._store.messages(after, _PAGE):
            for message in page:
                pause = self._refused.get(message.outpoint)
                if message.outpoint != left_out and (pause is None or pause.is_over):
                    await self._deliver(message)
                if self._failed is not None:
                    return False
                if self._task is not None:
                    self._task.succeeded()
            after = page[-1].key
        return True

    async def _deliver(self, message: Message) -> None:
        """Deliver one message, or note the pause after which it is tried again."""
        name = msgspec.json.decode(message.body, type=_Named).idempotency_key
        try:
            await self._receiver.tell(name, message.body)
        except ApplicationSilent as error:
            if isinstance(error, MessageRefused) and len(self._refused) < _MOST_PAUSED:
                before = self._refused.get(message.outpoint)
                pause = self._refused[message.outpoint] = _longer(before, str(error))
            else:
                before = self._silent
                pause = self._silent = _longer(before, str(error))
                self._failed = message
            if before is None or pause.seconds > before.seconds:  # the longest pause is logged once
                log.warning("a message was not delivered", message=name, reason=str(error), pause_seconds=pause.seconds)
        else:
            self._refused.pop(message.outpoint, None)
            self._silent = None
            await self._store.delivered(message.key)


def announce_again(now: UnixTime) -> Callable[[Channel | None, Channel], list[bytes]]:
    """Make the function that returns the messages about a channel that a restore writes at this time."""
    return lambda _, restored: _encoded(lambda: events_again(restored, now), restored)


def _encoded(make: Callable[[], list[Told]], channel: Channel) -> list[bytes]:
    try:
        return [encode_json(event) for event in make()]
    except Exception:
        log.exception("no message could be made", channel=str(channel.outpoint))
        return []


def _longer(pause: _Pause | None, reason: str) -> _Pause:
    now = monotonic()
    seconds = min(2 * pause.seconds, _LONGEST_PAUSE_SECONDS) if pause else _FIRST_PAUSE_SECONDS
    return _Pause(seconds, now + seconds, pause.since if pause else now, reason)
