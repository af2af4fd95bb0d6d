"""Damaged stores (fault 32): a torn tail does not prevent the start, and all readable records are salvaged and listed."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from pathlib import Path

import plyvel
import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from paychan.cli.main import app
from paychan.protocol.channel import Channel, State
from paychan.protocol.record import encode_record
from paychan.shared.leveldb_log import torn_tail
from paychan.store.backup import create as backup
from paychan.store.backup.archive import read_records
from paychan.store.base import Change, StoreFailed, walk
from paychan.store.leveldb.store import LevelDbStore
from tests.contract.backends import NETWORK
from tests.lib.channels import Payer

CHANNELS = [Payer(f"salvage {number}").channel() for number in range(12)]


def write(path: Path, channels: list[Channel], previous: list[Channel] | None = None) -> None:
    """Store each of these with a separate synced write; opening moves the log's content into a table."""

    async def commit() -> None:
        store = LevelDbStore.open(path, NETWORK)
        for before, channel in zip(previous or [None] * len(channels), channels, strict=True):
            assert await store.commit([Change(before, channel)]) == [True]
        await store.close()

    asyncio.run(commit())


def read(path: Path) -> list[Channel]:
    async def all_open() -> list[Channel]:
        store = LevelDbStore.open(path, NETWORK, create=False)
        try:
            return [channel async for channel in walk(store, State.OPEN)]
        finally:
            await store.close()

    return asyncio.run(all_open())


def paid(channel: Channel, number: int) -> Channel:
    return Payer(f"salvage {number}").pay(channel, 1_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with older records in a table and the newest in the log: channels 6 to 8, and 0 to 2 after a payment."""
    path = tmp_path_factory.mktemp("made") / "store"
    write(path, CHANNELS[:6])
    write(path, CHANNELS[6:9] + [paid(CHANNELS[number], number) for number in range(3)], [None] * 3 + CHANNELS[:3])
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "store")


def by_place(channel: Channel) -> str:
    return str(channel.outpoint)


NEWEST = sorted([paid(CHANNELS[number], number) for number in range(3)] + CHANNELS[3:9], key=by_place)


def newest_log(path: Path) -> Path:
    return max(path.glob("[0-9]*.log"))


def same(found: list[Channel]) -> bool:
    return sorted(found, key=by_place) == NEWEST


def junk(kind: str, size: int) -> bytes:
    """Random bytes; LevelDB takes them for damage behind a header with a fitting length, else for a torn record."""
    noise = random.Random(size).randbytes(size)
    header = {"no header": b"", "unknown type": b"\x0a\x00\x77", "a record's type": b"\x0a\x00\x01"}[kind]
    return noise[:4] + header + noise[4:]


@pytest.mark.parametrize("size", [1, 40, 4096, 40_000])
@pytest.mark.parametrize("kind", ["no header", "unknown type", "a record's type"])
def test_fault_32_a_torn_tail_does_not_stop_the_start(store: Path, kind: str, size: int):
    """Bytes behind the last record of the log, never acknowledged, are removed and kept aside; no record is lost."""
    tail = junk(kind, size)
    with newest_log(store).open("ab") as log:
        log.write(tail)

    assert same(read(store))
    kept = [path.read_bytes() for path in store.parent.glob("store.torn-*")]
    assert kept in ([], [tail])
    assert kept or kind == "no header" or size == 1


def test_fault_32_a_torn_record_is_left_out(made: Path, tmp_path: Path):
    """If the last record is truncated at any byte, or its last sectors were never written, only that record is missing."""
    log = newest_log(made).read_bytes()
    write(scratch := shutil.copytree(made, tmp_path / "scratch"), [CHANNELS[9]])
    whole = newest_log(scratch).read_bytes()
    for number, cut in enumerate((1, 5, 9, len(whole) // 2, len(whole) - 1)):
        path = shutil.copytree(scratch, tmp_path / f"cut {number}")
        newest_log(path).write_bytes(whole[:cut])
        assert same(read(path)), cut

    torn = log + b"\x12" * 7 + bytes(3_000)
    assert torn_tail(torn) == len(log)


def test_fault_32_only_an_unfinished_record_is_a_torn_tail(made: Path):
    """Junk behind the last record is removed; a damaged record in front of it may have been acknowledged."""
    log = newest_log(made).read_bytes()
    rng = random.Random(32)
    assert torn_tail(log) is None
    for _ in range(60):
        junk = rng.randbytes(rng.randrange(7, 400))
        assert torn_tail(log + junk) in (len(log), None)
        place = rng.randrange(len(log))
        flipped = bytearray(log)
        flipped[place] ^= 1 << rng.randrange(8)
        cut = torn_tail(bytes(flipped))
        assert cut is None or cut > place - 7 - 300  # never an earlier record
    first = bytearray(log)
    first[40] ^= 1
    assert torn_tail(bytes(first)) is None
    last = bytearray(log)
    last[-3] ^= 1
    assert torn_tail(bytes(last)) is None


def salvaged(store: Path, tmp_path: Path) -> tuple[list[Channel], str, int]:
    """Salvage by the command, restore the backup, and return the channels, the output, and the exit status."""
    state = tmp_path / "state"
    config = tmp_path / "server.toml"
    config.write_text(
        f'network = "test"\nstate_dir = "{state}"\n[chain]\nbackend = "electrum"\nurl = "tcp://127.0.0.1:1"\n'
        f'[store]\npath = "{store}"\n'
    )
    before = {path.name: path.read_bytes() for path in store.iterdir() if path.name not in ("OWNER", "LOCK")}
    result = CliRunner().invoke(app, ["backup", "salvage", str(config)])
    after = {path.name: path.read_bytes() for path in store.iterdir() if path.name not in ("OWNER", "LOCK")}
    assert before == after, "the evidence was changed"
    [made] = (state / "backups").glob("*.backup")
    assert len(list(read_records(made))) > 0
    backup.restore(made, tmp_path / "restored", NETWORK)
    return (
        [replace(channel, restored=False) for channel in read(tmp_path / "restored")],
        result.output,
        result.exit_code,
    )


@pytest.mark.parametrize("damage", ["manifest cut", "manifest gone", "current gone", "current empty"])
def test_fault_32_whole_records_are_salvaged_completely(store: Path, tmp_path: Path, damage: str):
    """Without the files that list the valid tables, every record is still found, at its newest version."""
    manifest = next(store.glob("MANIFEST-*"))
    if damage == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:20])
    elif damage == "manifest gone":
        manifest.unlink()
    elif damage == "current gone":
        (store / "CURRENT").unlink()
    else:
        (store / "CURRENT").write_bytes(b"")
    with pytest.raises(StoreFailed, match="paychan backup salvage"):
        read(store)

    found, said, _ = salvaged(store, tmp_path)

    assert same(found), said
    assert re.search(r"Move \S+ away first\.", said)


def test_fault_32_a_lost_table_costs_only_its_records(store: Path, tmp_path: Path):
    """An empty table prevents the start; the log and the other tables are salvaged, and the loss is listed."""
    for table in store.glob("*.ldb"):
        table.write_bytes(b"")
    with pytest.raises(StoreFailed):
        read(store)

    found, said, status = salvaged(store, tmp_path)

    assert {channel.outpoint for channel in found} == {channel.outpoint for channel in CHANNELS[:3] + CHANNELS[6:9]}
    assert [paid(CHANNELS[number], number) in found for number in range(3)] == [True] * 3
    assert status == 1
    assert "LevelDB dropped" in said


def test_fault_32_a_damaged_record_is_named(store: Path, tmp_path: Path):
    """A channel's only record has a wrong checksum: its outpoint is listed, and the other channels are salvaged."""
    database = plyvel.DB(str(store))
    rotten = CHANNELS[10].outpoint
    database.put(b"c" + rotten.serialize(), b"rotten", sync=True)
    database.close()

    found, said, status = salvaged(store, tmp_path)

    assert rotten not in {channel.outpoint for channel in found}
    assert same(found)
    assert (status, f"damaged record {rotten}\n" in said) == (1, True)


@pytest.mark.parametrize("place", ["log", "table"])
def test_fault_32_a_damaged_newest_record_leaves_the_one_before_it(made: Path, tmp_path: Path, place: str):
    """One byte of a payment is damaged: the channel is salvaged with the payment before, from log or table, and is listed."""
    store = shutil.copytree(made, tmp_path / "store")
    if place == "table":
        write(store, [CHANNELS[9]])  # opening moves the payments into a table
    files = {path: path.read_bytes() for path in store.iterdir() if path.suffix in (".log", ".ldb")}
    newest = encode_record(paid(CHANNELS[2], 2))
    [(file, content)] = [(path, content) for path, content in files.items() if newest in content]
    assert (file.suffix == ".log") is (place == "log")
    rotten = bytearray(content)
    rotten[content.index(newest) + len(newest) // 2] ^= 1
    file.write_bytes(rotten)

    found, said, status = salvaged(store, tmp_path)

    there = {channel.outpoint: channel for channel in found}
    assert there[CHANNELS[2].outpoint] == CHANNELS[2]
    assert {channel.outpoint for channel in NEWEST} <= there.keys()
    assert f"damaged record {CHANNELS[2].outpoint}: the backup holds an older one" in said
    assert status == 1


def test_fault_32_records_behind_damage_in_a_log_are_salvaged(store: Path, tmp_path: Path):
    """A wrong length at the log's beginning: LevelDB skips the block; its whole records are found nevertheless."""
    log = newest_log(store)
    content = bytearray(log.read_bytes())
    content[4] ^= 8  # the length of the first write, which opened channel 6
    log.write_bytes(content)

    found, said, status = salvaged(store, tmp_path)

    assert same(found), said
    assert (status, "LevelDB dropped" in said) == (1, True)


def test_fault_32_a_store_in_use_is_not_salvaged(store: Path, tmp_path: Path):
    """A copy of a running store would mix two moments."""
    config = tmp_path / "server.toml"
    config.write_text(
        f'network = "test"\nstate_dir = "{tmp_path}"\n[chain]\nbackend = "electrum"\nurl = "tcp://127.0.0.1:1"\n'
        f'[store]\npath = "{store}"\n'
    )
    running = LevelDbStore.open(store, NETWORK)
    result = CliRunner().invoke(app, ["backup", "salvage", str(config)])
    asyncio.run(running.close())

    assert result.exit_code == 1
    assert "is in use by process" in result.output
