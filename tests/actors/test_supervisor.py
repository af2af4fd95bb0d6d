"""Supervision: a long-lived task that dies is restarted or ends the process, and never disappears silently."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from paychan.supervisor import Supervised, Supervisor
from tests.lib.crashes import Crash, Injected, each_wait
from tests.lib.world import settled_down, until


async def test_fault_27_a_task_killed_at_any_await_works_again_afterwards():
    """For a failure at any await the task is restarted, and the failure is an alarm until its next success."""
    for crash in each_wait():
        done: list[int] = []

        async def work(task: Supervised, done: list[int] = done) -> None:
            while True:
                await asyncio.sleep(0)
                async with asyncio.timeout(10), asyncio.Lock():
                    await asyncio.sleep(0)
                done.append(1)
                task.succeeded()
                await asyncio.sleep(0)
                if len(done) >= 3:
                    await asyncio.Event().wait()

        supervisor = Supervisor()
        task = supervisor.run("work", crash(work))
        await until(lambda done=done: len(done) >= 3)
        await settled_down()
        if crash.happened and task.last_success is None:
            assert supervisor.alarms
        await until(lambda task=task: task.running)
        await supervisor.close()

        assert task.restarts == (1 if crash.happened else 0)
        assert not task.running


async def test_a_crash_is_an_alarm_until_the_next_success():
    """Between a crash and the next success the alarms name the task and the error; afterwards they do not."""
    go_on, error = asyncio.Event(), Injected("first time")

    async def work(task: Supervised) -> None:
        if not task.restarts:
            raise error
        await go_on.wait()
        task.succeeded()
        await asyncio.Event().wait()

    supervisor = Supervisor()
    task = supervisor.run("work", work)
    await until(lambda: task.restarts)
    assert supervisor.alarms == ["work failed and is restarted: first time"]
    assert (supervisor.tasks[0].restarts, supervisor.tasks[0].last_success) == (1, None)
    go_on.set()
    await until(lambda: task.last_success)

    assert supervisor.alarms == []
    assert supervisor.tasks[0].restarts == 1
    await supervisor.close()


@pytest.mark.parametrize("error", [Injected("x"), asyncio.CancelledError(), MemoryError(), None], ids=repr)
async def test_any_end_of_an_endless_task_starts_it_again(error: BaseException | None):
    """An exception, a cancellation from inside and a plain return all cause a restart."""
    calls: list[int] = []

    async def work(_task: Supervised) -> None:
        calls.append(1)
        if len(calls) > 2:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if error is not None:
            raise error

    supervisor = Supervisor()
    supervisor.run("work", work)
    await until(lambda: len(calls) == 3)
    await supervisor.close()


async def test_stopping_is_quiet_even_if_the_work_swallows_a_cancellation(monkeypatch: pytest.MonkeyPatch):
    """`stop` returns when the task has ended, even if it ignores the first cancellation; no restart, no alarm."""
    monkeypatch.setattr("paychan.supervisor._STOP_SECONDS", 0.01)
    swallowed: list[int] = []

    async def work(_task: Supervised) -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(1)
                if len(swallowed) > 1:
                    raise

    supervisor = Supervisor()
    task = supervisor.run("work", work)
    await settled_down()
    await task.stop()

    assert (task.running, task.restarts, supervisor.alarms, len(swallowed)) == (False, 0, [], 2)


async def test_a_fatal_task_ends_the_process():
    """The crash of a fatal task goes to `give_up` once, and the task is not restarted."""
    ends: list[BaseException] = []
    error = Injected("disk on fire")

    async def work(_task: Supervised) -> None:
        await asyncio.sleep(0)
        raise error

    supervisor = Supervisor(give_up=ends.append)
    task = supervisor.run("work", work, fatal=True)
    await until(lambda: not task.running)

    assert ends == [error]


async def test_a_task_that_hangs_is_an_alarm():
    """A task that reports no success in time causes an alarm although it did not crash."""
    supervisor = Supervisor()
    task = supervisor.run("work", lambda _task: asyncio.Event().wait(), patience_seconds=0.01)  # type: ignore[arg-type,return-value]
    await until(lambda: supervisor.alarms)
    assert supervisor.alarms[0].startswith("work has done nothing for ")
    task.succeeded()
    assert supervisor.alarms == [] or "work" in supervisor.alarms[0]
    await supervisor.close()


async def test_back_off_doubles_and_ends_at_a_success(monkeypatch: pytest.MonkeyPatch):
    """Pauses between restarts double up to the longest, and start again after a success."""
    pauses: list[float] = []
    real = asyncio.sleep
    monkeypatch.setattr("paychan.supervisor._FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr("paychan.supervisor._LONGEST_PAUSE_SECONDS", 4.0)

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr("paychan.supervisor.asyncio.sleep", sleep)

    async def work(task: Supervised) -> None:
        if task.restarts == 4:
            task.succeeded()
        if task.restarts == 6:
            await asyncio.Event().wait()
        raise Injected

    supervisor = Supervisor()
    task = supervisor.run("work", work)
    async with asyncio.timeout(20):
        while task.restarts < 6:
            await real(0.001)
    await supervisor.close()

    assert pauses == [1, 2, 4, 4, 1, 2]


async def test_work_that_is_not_endless(tmp_path: Path):
    """Work that is not endless may return; two tasks can't run under one name."""
    supervisor = Supervisor()
    finite = supervisor.run("rescan", lambda _task: asyncio.sleep(0), endless=False)  # type: ignore[arg-type,return-value]
    with pytest.raises(RuntimeError):
        supervisor.run("rescan", lambda _task: asyncio.sleep(0), endless=False)  # type: ignore[arg-type,return-value]
    await until(lambda: not finite.running)
    supervisor.run("rescan", Crash(1)(lambda _task: asyncio.sleep(0)), endless=False)
    await until(lambda: not supervisor.tasks)
    assert finite.restarts == 0
