"""Group commit: waiting changes are written together, and no caller gets an answer before they are on disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.group_commit import GroupCommit
from paychan.protocol.channel import Accepted, Outcome, Rejected
from paychan.protocol.errors import TryAgain
from paychan.store.base import Change, StoreFailed
from paychan.store.leveldb.store import LevelDbStore
from tests.lib.channels import Payer
from tests.lib.world import Faulty, settled_down, until


class Writer:
    """A group commit over a real store whose commits the test can block; counts the records of each group."""

    def __init__(self, directory: Path, delay_seconds: float = 0) -> None:
        self.real = LevelDbStore.open(directory / "store", "test")
        self.store = Faulty(self.real)
        self.groups: list[int] = []
        self.failures: list[BaseException] = []
        self.conflicts: list[str] = []
        self.commits = GroupCommit(self, delay_seconds, self.failures.append)  # type: ignore[arg-type]

    async def commit(self, changes: list[Change]) -> list[bool]:
        self.groups.append(len(changes))
        return await self.store.commit(changes)  # type: ignore[no-any-return]

    def put(self, name: str) -> asyncio.Future[Outcome]:
        channel = Payer(name).channel()
        return self.commits.put(Change(None, channel), Accepted(channel), lambda: self.conflicts.append(name))


@pytest.fixture
async def writer(tmp_path: Path):
    writer = Writer(tmp_path)
    yield writer
    await writer.real.close()


async def test_changes_gather_while_a_group_is_written(writer: Writer):
    """All changes put during one synced write become the next group, whatever their number."""
    writer.store.hold("commit")
    waiting = [writer.put("first")]
    await settled_down()
    for name in "abcde":
        waiting.append(writer.put(name))
        await settled_down()
    writer.store.release("commit")
    await asyncio.gather(*waiting)

    assert writer.groups == [1, 5]


async def test_nothing_is_answered_while_the_disk_writes(writer: Writer):
    """A change's future is done only after the write that contains it has returned."""
    writer.store.hold("commit")
    waiting = [writer.put(name) for name in "abc"]
    await settled_down()

    assert not any(future.done() for future in waiting)
    writer.store.release("commit")
    assert all(isinstance(outcome, Accepted) for outcome in await asyncio.gather(*waiting))


async def test_a_failed_write_answers_no_caller(writer: Writer):
    """A failing store is reported once per attempt, and no change of that group is ever answered."""
    writer.store.fail("commit", StoreFailed("disk on fire"), times=1)
    waiting = [writer.put(name) for name in "abc"]
    await until(lambda: writer.failures)
    await writer.commits.close()

    assert [str(error) for error in writer.failures] == ["disk on fire"]
    assert not any(future.done() for future in waiting)


async def test_a_conflict_is_answered_and_the_others_are_written(writer: Writer):
    """A conflicting change gets TryAgain after its callback ran, and does not block the rest of its group."""
    await writer.put("taken")
    taken, free = writer.put("taken"), writer.put("free")
    outcomes = await asyncio.gather(taken, free)

    assert outcomes[0] == Rejected(TryAgain())
    assert isinstance(outcomes[1], Accepted)
    assert writer.conflicts == ["taken"]


async def test_closing_writes_what_was_put_before(writer: Writer):
    """After `close` all changes put before it are on disk, also those that gathered during a write."""
    writer.store.hold("commit")
    writer.put("a")
    await settled_down()
    writer.put("b")
    closing = asyncio.create_task(writer.commits.close())
    await settled_down()

    assert not closing.done()
    writer.store.release("commit")
    await closing
    assert await writer.real.get(Payer("b").outpoint) is not None


async def test_after_closing_nothing_is_written_or_answered(writer: Writer):
    """Work that continues while the process ends gets neither an error of a closed store nor an answer."""
    await writer.commits.close()
    late = writer.put("late")
    await settled_down()

    assert not late.done()
    assert writer.failures == []
    assert await writer.real.get(Payer("late").outpoint) is None


async def test_a_delay_gathers_more(tmp_path: Path):
    """With a delay set, changes that come during it join the first write."""
    writer = Writer(tmp_path, delay_seconds=0.05)
    waiting = [writer.put("a")]
    await settled_down()
    waiting.append(writer.put("b"))
    await asyncio.gather(*waiting)
    await writer.real.close()

    assert writer.groups == [2]
