"""A LevelDB on a full disk continues to write with its reserve: into its log, a new log and a table, and after a restart."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import plyvel
import pytest

import paychan.shared.reservefile
from paychan.diskreserve import DiskReserve
from paychan.shared.reservefile import ReserveFile
from paychan.store.leveldb.directory import WRITE_BUFFER_BYTES
from paychan.store.leveldb.store import LevelDbStore
from tests.lib.smalldisk import fill, small_file_system

BUFFER_BYTES = 4 << 20
RESERVE_BYTES = 8 << 20
VALUE = bytes(1000)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", mib=48) as disk:
        yield disk


def make_reserve(disk: Path) -> ReserveFile:
    reserve = ReserveFile(disk / "reserve", disk / "store", RESERVE_BYTES, BUFFER_BYTES)
    assert reserve.fill_up(0) == ""
    assert (reserve.held, (disk / "reserve").stat().st_blocks * 512) == (RESERVE_BYTES, RESERVE_BYTES)
    return reserve


def write(database: plyvel.DB, reserve: ReserveFile, number: int) -> None:
    batch = database.write_batch(sync=True)
    batch.put(b"c%08d" % number, VALUE)
    reserve.before_write(batch.approximate_size())
    batch.write()


def test_fault_62_a_write_takes_no_more_than_it_needs(disk: Path) -> None:
    """While there is space, no call takes from the reserve; without a free byte 500 writes take less than 1 MB."""
    reserve = make_reserve(disk)
    database = plyvel.DB(str(disk / "store"), create_if_missing=True, write_buffer_size=BUFFER_BYTES)
    for number in range(100):
        write(database, reserve, number)
    assert reserve.held == RESERVE_BYTES
    fill(disk / "filler")
    for number in range(500):
        write(database, reserve, number)
        fill(disk / f"filler-{number}")
    assert RESERVE_BYTES - 1_000_000 <= reserve.held < RESERVE_BYTES
    database.close()


def test_fault_62_a_full_log_becomes_a_table_on_a_full_disk(disk: Path) -> None:
    """The reserve gives the space for the table when the log is full, and takes back the space of the old log."""
    reserve = make_reserve(disk)
    database = plyvel.DB(str(disk / "store"), create_if_missing=True, write_buffer_size=BUFFER_BYTES, compression=None)
    for number in range(2_500):
        write(database, reserve, number)
    fill(disk / "filler")
    first = reserve.newest_log()
    for number in range(2_500, 6_000):
        write(database, reserve, number)
    assert reserve.newest_log() != first
    database.close()
    reserve.fill_up(0)
    before = reserve.held
    fill(disk / "more")
    assert reserve.make_room(reserve.opening_bytes())
    database = plyvel.DB(str(disk / "store"), write_buffer_size=BUFFER_BYTES)
    assert sum(1 for _ in database.iterator()) == 6_000
    reserve.fill_up(0)
    assert reserve.held >= before - BUFFER_BYTES
    database.close()


def test_fault_62_a_reserve_that_does_not_suffice_is_kept(disk: Path) -> None:
    """The reserve gives no slice for a table that it can't hold completely."""
    reserve = make_reserve(disk)
    fill(disk / "filler")
    assert not reserve.make_room(RESERVE_BYTES + 1)
    assert reserve.held == RESERVE_BYTES
    assert reserve.make_room(1)
    assert 0 < RESERVE_BYTES - reserve.held <= 1 << 20


def test_fault_62_a_file_system_that_can_not_allocate_ahead(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a file system the space is freed just before the write."""

    class Unable:
        @staticmethod
        def fallocate(*_: object) -> int:
            return -1

    monkeypatch.setattr(paychan.shared.reservefile, "_libc", Unable)
    monkeypatch.setattr("ctypes.get_errno", lambda: 95)
    reserve = make_reserve(disk)
    database = plyvel.DB(str(disk / "store"), create_if_missing=True, write_buffer_size=BUFFER_BYTES)
    fill(disk / "filler")
    for number in range(500):
        write(database, reserve, number)
    assert RESERVE_BYTES - 2_000_000 <= reserve.held < RESERVE_BYTES
    database.close()


def test_fault_62_a_long_log_is_written_into_a_table_while_there_is_space(tmp_path: Path) -> None:
    """If less work is allowed than before, the store begins a new log, unless the log is short."""

    async def run() -> None:
        store = LevelDbStore.open(tmp_path / "store", "test")
        reserve = DiskReserve(tmp_path / "store", 4 << 20, WRITE_BUFFER_BYTES)
        first = reserve.file.newest_log()
        await store.begin_log()
        assert reserve.file.newest_log() == first
        store._database.put(b"c", bytes(WRITE_BUFFER_BYTES // 3))
        await store.begin_log()
        assert reserve.file.newest_log() != first
        await store.close()

    asyncio.run(run())


def test_fault_62_opening_the_store_fills_no_disk(disk: Path) -> None:
    """A reserve larger than the disk takes no byte; after the store is opened, it takes back only what it gave."""
    free = os.statvfs(disk).f_bavail
    too_large = DiskReserve(disk / "store", 1 << 40, BUFFER_BYTES)
    too_large.look()
    too_large.opened()
    assert os.statvfs(disk).f_bavail == free

    fitting = DiskReserve(disk / "store", 4 * RESERVE_BYTES, BUFFER_BYTES)
    fitting.look()
    assert fitting.file.held == RESERVE_BYTES
    fill(disk / "other")
    assert fitting.file.make_room(1 << 20)
    assert fitting.file.held < RESERVE_BYTES
    fitting.opened()
    assert RESERVE_BYTES - (512 << 10) <= fitting.file.held <= RESERVE_BYTES
