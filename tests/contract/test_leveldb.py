"""Properties of the LevelDB store only: a directory that one process may open, and files that can be damaged."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import plyvel
import pytest

from paychan.protocol.channel import Channel, State
from paychan.store.base import Damage, StoreFailed, get_readable
from paychan.store.leveldb.keys import STATE_CODES
from paychan.store.leveldb.store import LevelDbStore
from tests.contract.backends import NETWORK
from tests.contract.backups import names, put
from tests.lib.channels import many

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from paychan.store.leveldb.store import LevelDbStore
store = LevelDbStore.open(Path(sys.argv[1]), "test")
print("open", flush=True)
sys.stdin.read()
"""


def fill(path: Path, channels: list[Channel], *, table: bool) -> None:
    """Create a store with these channels: in its log, or, after a second opening, in a table file."""

    async def write() -> None:
        store = LevelDbStore.open(path, NETWORK)
        for begin in range(0, len(channels), 10):
            await put(store, *channels[begin : begin + 10])
        await store.close()

    asyncio.run(write())
    if table:
        close(LevelDbStore.open(path, NETWORK))


def close(store: LevelDbStore) -> None:
    asyncio.run(store.close())


# --- the lock -------------------------------------------------------------------------------------------------------


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the store open."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield process
        process.communicate()  # the process ends at the end of its input


def test_threat_39_a_second_process_is_refused(tmp_path: Path) -> None:
    """The error names the process that has the store open, by id and command; after its end the store opens."""
    path = tmp_path / "store"
    with holder(path) as other, pytest.raises(StoreFailed, match=rf"in use by process {other.pid} \(.*python"):
        LevelDbStore.open(path, NETWORK)
    close(LevelDbStore.open(path, NETWORK))


def test_a_second_store_in_this_process_is_refused(tmp_path: Path) -> None:
    """A second opening is an error, and the failed attempt does not release the lock against other processes."""
    path = tmp_path / "store"
    store = LevelDbStore.open(path, NETWORK)
    with pytest.raises(StoreFailed, match=f"in use by process {os.getpid()} "):
        LevelDbStore.open(path, NETWORK)
    other = subprocess.run(
        [sys.executable, "-c", HOLDER, path], cwd=ROOT, input="", capture_output=True, text=True, check=False
    )
    close(store)

    assert f"in use by process {os.getpid()} " in other.stderr


def test_another_program_is_found(tmp_path: Path) -> None:
    """A program that uses only LevelDB's own lock is excluded, and the error distinguishes it from a server."""
    path = tmp_path / "store"
    close(LevelDbStore.open(path, NETWORK))
    database = plyvel.DB(str(path))
    with pytest.raises(StoreFailed, match=r"in use by another program: the command `fuser .*/LOCK` finds it"):
        LevelDbStore.open(path, NETWORK)
    database.close()


def test_a_store_belongs_to_one_network(tmp_path: Path) -> None:
    """A store of one network is not opened for another one, and the attempt does not change it."""
    path = tmp_path / "store"
    fill(path, many(10), table=False)

    with pytest.raises(StoreFailed, match="of the test network, not live"):
        LevelDbStore.open(path, "live")
    store = LevelDbStore.open(path, NETWORK)
    assert len(asyncio.run(store.scan(State.OPEN))) == 10
    close(store)


def test_another_format_is_refused(tmp_path: Path) -> None:
    """A store with a later version's key layout is not changed."""
    path = tmp_path / "store"
    close(LevelDbStore.open(path, NETWORK))
    database = plyvel.DB(str(path))
    database.put(b"z", b"2 test")
    database.close()

    with pytest.raises(StoreFailed, match="store format 2, this program reads 1"):
        LevelDbStore.open(path, NETWORK)


def test_the_key_layout_is_frozen(tmp_path: Path) -> None:
    """The keys are those of existing stores; any change needs another format number."""
    path, channel = tmp_path / "store", many(1)[0]
    fill(path, [channel], table=False)
    database = plyvel.DB(str(path))
    keys = list(database.iterator(include_value=False))
    database.close()

    outpoint = channel.outpoint.serialize()
    assert keys == [b"c" + outpoint, b"i\x01" + channel.terms.expiry.lock_time.to_bytes(4, "big") + outpoint, b"z"]
    assert {state.value: code for state, code in STATE_CODES.items()} == {
        "open": 1,
        "closing": 2,
        "published": 3,
        "closed": 4,
        "lost": 5,
        "unfunded": 6,
    }


@pytest.mark.parametrize("files", [["notes.txt"], ["000005.ldb"], ["000003.log"]])
def test_no_store_is_created_among_other_files(tmp_path: Path, files: list[str]) -> None:
    """A directory with other files is refused and not changed; LevelDB would delete tables in it."""
    for name in files:
        (tmp_path / name).touch()

    with pytest.raises(StoreFailed, match="not a store, or is damaged"):
        LevelDbStore.open(tmp_path, NETWORK)
    assert names(tmp_path) == files


def test_a_store_is_created_only_on_request(tmp_path: Path) -> None:
    """Without `create` a missing store is an error, and no directory appears; with it, only this user may read it."""
    path = tmp_path / "deep" / "store"
    with pytest.raises(StoreFailed, match="there is no store in"):
        LevelDbStore.open(path, NETWORK, create=False)
    assert names(tmp_path) == []

    close(LevelDbStore.open(path, NETWORK))
    assert oct(path.stat().st_mode)[-3:] == "700"
    assert names(path.parent) == ["store"]


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    """For a path below a file, the error names that file."""
    (tmp_path / "file").touch()

    with pytest.raises(StoreFailed, match=r"file/store can't be opened: .*File exists"):
        LevelDbStore.open(tmp_path / "file" / "store", NETWORK)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [False, True])
async def test_threat_12_no_flipped_byte_loses_a_channel_silently(tmp_path: Path, table: bool) -> None:
    """One changed bit in any file of the store causes an error at opening or reading, or has no effect (threat 12)."""
    path, channels, chance = tmp_path / "store", many(200), random.Random(5)
    await asyncio.to_thread(fill, path, channels, table=table)
    refused = 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        if not whole or file.name.startswith("LOG") or file.name == "OWNER":
            continue
        for position in chance.sample(range(len(whole)), min(25, len(whole))):
            changed = bytearray(whole)
            changed[position] ^= 1 << chance.randrange(8)
            copy = tmp_path / "copy"
            await asyncio.to_thread(subprocess.run, ["cp", "-r", path, copy], check=True)
            (copy / file.name).write_bytes(changed)
            refused += await damage_is_reported(copy, channels)
            await asyncio.to_thread(subprocess.run, ["rm", "-r", copy], check=True)
    assert refused > 20


async def damage_is_reported(path: Path, channels: list[Channel]) -> bool:
    """Return whether the store is refused or reports damage; check that every readable channel is listed."""
    try:
        store = LevelDbStore.open(path, NETWORK)
    except StoreFailed:
        return True
    try:
        listed = set(await store.scan(State.OPEN))
        assert listed == {channel for channel in channels if await get_readable(store, channel.outpoint)}
        assert listed == set(channels) or store.damage.text

        def read() -> int:
            with store.snapshot() as records:
                return sum(1 for _ in records)

        assert await asyncio.to_thread(read) == len(channels)
        return bool(store.damage.text)
    except StoreFailed:
        return True
    finally:
        await store.close()


async def test_a_truncated_walk_is_damage(tmp_path: Path) -> None:
    """If the last blocks are damaged under an open store, listing reports it; plyvel alone would end without an error."""
    path = tmp_path / "store"
    await asyncio.to_thread(fill, path, many(200), table=True)
    database = plyvel.DB(str(path), compression=None)
    database.compact_range(start=b"a", stop=b"zz")  # into one table
    database.close()
    store = LevelDbStore.open(path, NETWORK)
    (table,) = path.glob("*.ldb")
    position = table.read_bytes().rindex(b"1 test")  # in the block of the key that sorts behind all others
    with table.open("r+b") as file:
        file.seek(position)
        file.write(b"?")

    assert len(await store.scan(State.OPEN)) == 200, "where the index is damaged, the records tell"
    assert store.damage == Damage(block="the last blocks can't be read")
    with store.snapshot() as records:
        assert len(list(records)) == 200, "these are in other blocks"
    await store.close()


@pytest.mark.parametrize("lost", ["CURRENT", "*.ldb", "MANIFEST-*", "*.log"])
async def test_a_lost_file_is_not_an_empty_store(tmp_path: Path, lost: str) -> None:
    """A store that lost CURRENT, a table or its manifest is refused; it never opens with fewer channels."""
    path = tmp_path / "store"
    await asyncio.to_thread(fill, path, many(20), table=True)
    found = max(path.glob(lost))
    found.unlink()

    with pytest.raises(StoreFailed, match="damaged"):
        LevelDbStore.open(path, NETWORK)


async def test_a_torn_last_commit_is_dropped_whole(tmp_path: Path) -> None:
    """A log truncated at any byte of its last, unacknowledged commit opens with all earlier commits and no part of that one."""
    path, channels = tmp_path / "store", many(20)
    await asyncio.to_thread(fill, path, channels[:10], table=False)
    (log,) = path.glob("*.log")
    before = log.stat().st_size
    whole = tmp_path / "whole"
    await asyncio.to_thread(fill, whole, channels, table=False)
    (log,) = whole.glob("*.log")
    for size in range(before, log.stat().st_size, 97):
        copy = tmp_path / "copy"
        await asyncio.to_thread(subprocess.run, ["cp", "-r", whole, copy], check=True)
        os.truncate(copy / log.name, size)
        store = LevelDbStore.open(copy, NETWORK)
        listed = await store.scan(State.OPEN)
        await store.close()
        assert {channel.outpoint for channel in listed} == {channel.outpoint for channel in channels[:10]}
        await asyncio.to_thread(subprocess.run, ["rm", "-r", copy], check=True)
