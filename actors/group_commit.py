"""Group commit: one synced write stores the waiting changes of all channels (architecture: persist first).

While one group syncs, new changes gather in the next one, which is written as soon as the loop gets to it: there is no
timer unless the operator sets one. A change's future is done only when its record is on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context as ContextOfCall
from contextvars import copy_context
from time import monotonic

from msgspec import Struct

from actors.observing import GroupWritten, Observers, PaymentBooked
from paychan.protocol.channel import Accepted, Outcome, Rejected
from paychan.protocol.errors import Overloaded, PaychanError, TryAgain
from paychan.store.base import Change, Store
from paychan.tracing import without_ids


class _Waiting(Struct, frozen=True):
    change: Change
    outcome: Accepted
    durable: asyncio.Future[Outcome]
    on_conflict: Callable[[], None]
    context: ContextOfCall | None = None
    """In which the change is reported, so that its log lines name its request; None: a payment, which none wants."""


class GroupCommit:
    """Gathers changes and commits them. `on_failure` must end the process: a failed sync must never be answered.

    It is also called if the writer is cancelled or fails otherwise: then it is unknown whether the group was written.
    `on_success` is called for each group that was written.
    """

    def __init__(
        self,
        store: Store,
        delay_seconds: float,
        on_failure: Callable[[BaseException], None],
        max_waiting: int = 10_000,
        on_success: Callable[[], None] = lambda: None,
        observers: Observers | None = None,
    ) -> None:
        self._store = store
        self._max_waiting = max_waiting
        self._delay_seconds = delay_seconds
        self._on_failure = on_failure
        self._on_success = on_success
        self._observers = observers or Observers()
        self._reports_all = PaymentBooked in self._observers.wanted
        self._gathered: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self.refusal: Callable[[], PaychanError | None] = lambda: None
        """Returns a refusal of payments that does not depend on their number: disk or memory is nearly full."""
        self._loop = asyncio.get_running_loop()

    def put(self, change: Change, outcome: Accepted, on_conflict: Callable[[], None]) -> asyncio.Future[Outcome]:
        """Queue a change; the future becomes `outcome` once it is durable, or `TryAgain` if another writer was first.

        On such a conflict `on_conflict` is called first, because the caller holds an outdated version.
        """
        durable: asyncio.Future[Outcome] = self._loop.create_future()
        if self._closed:
            return durable
        context, previous = None, change.previous
        if self._reports_all or previous is None or previous.state is not change.channel.state:
            context = copy_context()
        self._gathered.append(_Waiting(change, outcome, durable, on_conflict, context))
        if self._writer is None:
            self._writer = self._loop.create_task(self._write(), context=without_ids())
        return durable

    def overload(self) -> PaychanError | None:
        """Return the refusal of further payments if too many changes wait, or disk or memory is nearly full."""
        waiting = len(self._gathered)
        if waiting < self._max_waiting:
            return self.refusal()
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
                begun = monotonic()
                written = await self._store.commit([waiting.change for waiting in group])
                if GroupWritten in self._observers.wanted:
                    self._observers.report(GroupWritten(len(group), monotonic() - begun))
                for waiting, ok in zip(group, written, strict=True):
                    if not ok:
                        waiting.on_conflict()
                    if not waiting.durable.done():
                        waiting.durable.set_result(waiting.outcome if ok else Rejected(TryAgain()))
                    if ok and waiting.context is not None:
                        waiting.context.run(self._observers.report_change, waiting.change)
                self._on_success()
        except BaseException as error:  # noqa: BLE001 - after any failure the content of the disk is unknown
            self._on_failure(error)
        finally:
            self._writer = None
