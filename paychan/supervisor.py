"""Keeps long-lived tasks running: a task that fails is restarted or ends the process, and each failure is reported.

The composition root creates one `Supervisor`; a part that owns a task receives it and calls `run`. A task ends by:

* an exception at any await, including a cancellation from within: the failure is logged, it raises an alarm until the
  task's next success, and the task restarts after a pause that doubles up to a minute. A `fatal` task ends the process;
* a return, with the same effects: a long-lived task does not end by itself (unless `endless` is false);
* `stop` and `close`: without a report, even if a library swallows the first cancellation.

Each task reports every completed round of its work (`Supervised.succeeded`). If no report comes within the task's
patience, the task hangs, which raises an alarm as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from msgspec import Struct

from paychan.protocol.types import UnixTime

log = logging.getLogger("supervisor")
"""A standard logger: the payer's client, whose chain backends have tasks as well, does not use structlog."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 60.0
_STOP_SECONDS = 1.0


class TaskInfo(Struct, frozen=True):
    """One task, as `/health` shows it; times in Unix seconds."""

    name: str
    last_success: UnixTime | None
    restarts: int
    problem: str


class Supervised:
    """A supervised task; its work receives this object."""

    def __init__(self, name: str, clock: Callable[[], UnixTime], patience_seconds: float) -> None:
        self.name = name
        self.restarts = 0
        self._last_success: UnixTime | None = None
        self._clock = clock
        self._patience = patience_seconds
        self._crash = ""
        self._fresh_at = time.monotonic()
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self._guest: Callable[[], UnixTime | None] | None = None

    @property
    def last_success(self) -> UnixTime | None:
        """Unix time at which the last round of its work was completed."""
        return self._last_success if self._guest is None else self._guest()

    def succeeded(self) -> None:
        """Report one completed round of the task's work."""
        self._last_success = self._clock()
        self._fresh_at = time.monotonic()
        self._crash = ""
        self._failures = 0

    @property
    def problem(self) -> str:
        """The reason why the task does not work at the moment; empty while it does."""
        if self._crash:
            return f"{self.name} failed and is restarted: {self._crash}"
        silent = time.monotonic() - self._fresh_at
        if self._patience and silent > self._patience:
            return f"{self.name} has done nothing for {silent:.0f} s, limit {self._patience:.0f} s"
        return ""

    @property
    def running(self) -> bool:
        return self._guest is not None or (self._task is not None and not self._task.done())

    async def stop(self) -> None:
        """Cancel the task and wait until it has ended."""
        while self._task is not None and not self._task.done():  # repeated: a library may swallow a cancellation
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_STOP_SECONDS)

    def _crashed(self, error: BaseException) -> float:
        """Note a failure; return the pause in seconds."""
        self.restarts += 1
        self._crash = str(error) or type(error).__name__
        pause = min(_FIRST_PAUSE_SECONDS * 2.0**self._failures, _LONGEST_PAUSE_SECONDS)
        self._failures = min(self._failures + 1, 30)
        return pause


Work = Callable[[Supervised], Coroutine[Any, Any, None]]


class Supervisor:
    """The long-lived tasks of one process, by name.

    `give_up` must end the process; it is called when a fatal task fails.
    """

    def __init__(
        self, clock: Callable[[], UnixTime] | None = None, give_up: Callable[[BaseException], None] | None = None
    ) -> None:
        self._clock = clock or _wall_clock
        self._give_up = give_up or _no_way_out
        self._tasks: dict[str, Supervised] = {}

    def run(
        self, name: str, work: Work, *, fatal: bool = False, endless: bool = True, patience_seconds: float = 0
    ) -> Supervised:
        """Start a task on the running loop. An earlier task of the same name must have ended.

        `patience_seconds`: a longer time without a reported success raises an alarm; 0: no alarm.
        """
        earlier = self._tasks.get(name)
        if earlier is not None and earlier.running:
            msg = f"task {name} is already running"
            raise RuntimeError(msg)
        supervised = Supervised(name, self._clock, patience_seconds)
        self._tasks[name] = supervised
        task = asyncio.get_running_loop().create_task(self._keep_alive(supervised, work, fatal, endless), name=name)
        supervised._task = task  # noqa: SLF001 - the supervisor and its handles are one unit
        return supervised

    def guest(self, name: str, last_success: Callable[[], UnixTime | None]) -> None:
        """List a task that another part keeps running, or whose failure ends the process anyway.

        `last_success` returns the Unix time of its last success.
        """
        supervised = self._tasks[name] = Supervised(name, self._clock, 0)
        supervised._guest = last_success  # noqa: SLF001

    @property
    def tasks(self) -> list[TaskInfo]:
        """All running tasks, sorted by name."""
        return [
            TaskInfo(each.name, each.last_success, each.restarts, each.problem)
            for _, each in sorted(self._tasks.items())
            if each.running
        ]

    @property
    def alarms(self) -> list[str]:
        """The present problems of the tasks."""
        return [each.problem for each in self.tasks if each.problem]

    async def close(self) -> None:
        """Stop all tasks, the youngest first."""
        for supervised in reversed(self._tasks.values()):
            await supervised.stop()

    async def _keep_alive(self, supervised: Supervised, work: Work, fatal: bool, endless: bool) -> None:
        while True:
            try:
                await work(supervised)
                if not endless:
                    return
                error: BaseException = RuntimeError("the task ended")
            except asyncio.CancelledError as cancelled:
                if _is_being_stopped():
                    raise
                error = cancelled
            except Exception as raised:  # noqa: BLE001 - any failure leads to a restart
                error = raised
            pause = supervised._crashed(error)  # noqa: SLF001
            with suppress(Exception):  # a failing log must not end the task
                restarts = supervised.restarts
                log.error("task %s failed, restart %d, pause %s s", supervised.name, restarts, pause, exc_info=error)
            if fatal:
                self._give_up(error)
                return
            await asyncio.sleep(pause)


def _is_being_stopped() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _no_way_out(error: BaseException) -> None:
    raise error


def _wall_clock() -> UnixTime:
    return UnixTime(int(time.time()))
