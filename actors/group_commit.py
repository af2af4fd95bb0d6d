"""Group commit: one synced write stores the waiting changes of all channels (architecture: persist first).

While one group syncs, new changes gather in the next one, which is written as soon as the loop gets to it: there is no
timer unless the operator sets one. A caller hears of its change only when the record is on disk.

Groups have numbers. An actor notes the number of the group that holds its newest change, and asks later whether that
group is on disk; this costs a payment no future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context as ContextOfCall
from contextvars import copy_context
from functools import partial
from time import monotonic, time

import structlog
from msgspec import Struct

from actors.observing import GroupWritten, Observers
from paychan.protocol.channel import Accepted, Outcome, Rejected
from paychan.protocol.errors import Overloaded, PaychanError, TryAgain
from paychan.protocol.types import UnixTime
from paychan.store.base import Change, Store

log = structlog.get_logger("actors")


class _Waiting(Struct, frozen=True):
    change: Change
    outcome: Accepted
    then: Callable[[Outcome], object]
    on_conflict: Callable[[], None]
    context: ContextOfCall | None = None
    """In which the change is reported, so that its log lines name its request; None: a payment, which none wants."""


class GroupCommit:
    """Gathers changes and commits them. `on_failure` must end the process: a failed sync must never be answered.

    It is also called if the writer is cancelled or fails otherwise: then it is unknown whether the group was written.
    """

    def __init__(
        self,
        store: Store,
        delay_seconds: float,
        on_failure: Callable[[BaseException], None],
        max_waiting: int = 10_000,
        observers: Observers | None = None,
    ) -> None:
        self._store = store
        self._max_waiting = max_waiting
        self._delay_seconds = delay_seconds
        self._on_failure = on_failure
        self._observers = observers or Observers()
        self._gathered: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._waiters: list[asyncio.Future[None]] = []
        self.gathering = 1
        """Number of the group that fills now."""
        self.written = 0
        """Number of the last group that is on disk."""
        self.last_success: UnixTime | None = None
        """Unix time at which that group was written."""
        self.problem: PaychanError | None = None
        """The refusal of payments that does not depend on their number: disk or memory is nearly full."""

    def add(
        self,
        change: Change,
        outcome: Accepted,
        then: Callable[[Outcome], object],
        on_conflict: Callable[[], None],
    ) -> None:
        """Queue a change; call `then` with `outcome` once it is durable, or with `TryAgain` if another writer was first.

        On such a conflict `on_conflict` is called first, because the caller holds an outdated version.
        """
        if self._closed:
            return
        before, context = change.previous, None
        if self._observers.wants_payments or before is None or before.state is not change.channel.state:
            context = copy_context()
        self._gathered.append(_Waiting(change, outcome, then, on_conflict, context))
        if self._writer is None:
            self._writer = self._loop.create_task(self._write(), context=ContextOfCall())  # it works for all requests

    def put(self, change: Change, outcome: Accepted, on_conflict: Callable[[], None]) -> asyncio.Future[Outcome]:
        """Queue a change as `add` does; the future gets the outcome."""
        durable: asyncio.Future[Outcome] = self._loop.create_future()
        self.add(change, outcome, partial(_resolve, durable), on_conflict)
        return durable

    async def until_written(self, group: int) -> None:
        """Wait until a group is on disk."""
        while self.written < group:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def overload(self) -> PaychanError | None:
        """Return the refusal of further payments if too many changes wait, or disk or memory is nearly full."""
        waiting = len(self._gathered)
        if waiting < self._max_waiting:
            return self.problem
        return Overloaded(waiting=waiting, what="payments for the disk", limit=self._max_waiting)

    async def close(self) -> None:
        """Write the queued changes. Later ones are neither written nor answered, as if the process had ended before."""
        self._closed = True
        if self._writer is not None:
            await self._writer

    async def _write(self) -> None:
        try:
            while self._gathered:
                await asyncio.sleep(self._delay_seconds)  # without a delay that is one turn of the loop
                group, self._gathered = self._gathered, []
                number, self.gathering, begun = self.gathering, self.gathering + 1, monotonic()
                written = await self._store.commit([waiting.change for waiting in group])
                self.written, self.last_success = number, UnixTime(int(time()))
                if self._waiters:
                    self._wake_waiters()
                if GroupWritten in self._observers.wanted:
                    self._observers.report(GroupWritten(len(group), monotonic() - begun))
                for waiting, ok in zip(group, written, strict=True):
                    try:
                        if ok:
                            waiting.then(waiting.outcome)
                        else:
                            waiting.on_conflict()
                            waiting.then(Rejected(TryAgain()))
                    except Exception:
                        log.exception("answer failed", channel=str(waiting.change.channel.outpoint))
                    if ok and waiting.context is not None:
                        waiting.context.run(self._observers.report_change, waiting.change)
        except BaseException as error:  # noqa: BLE001 - after any failure the content of the disk is unknown
            self._on_failure(error)
        finally:
            self._writer = None

    def _wake_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _resolve(durable: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not durable.done():
        durable.set_result(outcome)
