"""Each long-lived task of the server is killed at each of its awaits; afterwards its work is done."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.group_commit import GroupCommit
from paychan.protocol.channel import Accepted, State
from paychan.protocol.types import UnixTime
from paychan.store.base import Change
from paychan.store.leveldb.store import LevelDbStore
from paychan.supervisor import Supervisor
from tests.lib.channels import NOW, Payer
from tests.lib.crashes import Crash, Injected, each_wait
from tests.lib.world import Clock, DebugPayer, local, until

HOUR = 3_600


async def test_fault_27_a_watcher_killed_at_any_await_settles_due_channels(tmp_path: Path):
    """For a failure at any await of the watcher's first scans, the due channel is closed, and the watcher works."""
    for crash in each_wait():
        clock = Clock(NOW)
        async with local(tmp_path / str(crash.at), clock) as server:
            due = DebugPayer("due", UnixTime(NOW + 30 * HOUR))
            await server.open(due)
            clock.now = NOW + 29 * HOUR
            supervisor = Supervisor(clock)
            task = supervisor.run("watcher", crash(server.watcher.run))

            async def closed(server=server, due=due) -> bool:  # type: ignore[no-untyped-def]
                return (await server.stored(due)).state is State.CLOSED

            async with asyncio.timeout(20):
                while not (await closed() and task.last_success):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            await supervisor.close()
            assert server.failures == []
        if crash.at >= 40:  # each further scan has the same awaits
            break


@pytest.mark.parametrize("error", [Injected(), asyncio.CancelledError(), MemoryError()], ids=repr)
async def test_fault_27_a_group_commit_killed_at_any_await_ends_the_process(tmp_path: Path, error: BaseException):
    """If anything ends the writer, even a cancellation, the process must end, and unwritten changes get no answer."""
    for at in (1, 2):
        store = LevelDbStore.open(tmp_path / f"store{at}", "test")
        failures: list[BaseException] = []
        commits = GroupCommit(store, 0, failures.append)
        commits._write = Crash(at, error)(commits._write)  # type: ignore[method-assign]
        channel = Payer("a").channel()
        answer = commits.put(Change(None, channel), Accepted(channel), lambda: None)
        await until(lambda failures=failures: failures)

        assert failures == [error]
        assert not answer.done()
        await store.close()
