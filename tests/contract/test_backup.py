"""Backups: one moment of any backend in a file, in which every changed byte is detected."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from paychan.protocol.channel import State
from paychan.protocol.record import decode_record, encode_record
from paychan.protocol.types import UnixTime
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError, Manifest, read_manifest, read_records
from paychan.store.base import Change, Store
from tests.contract.backends import NETWORK, Backend
from tests.contract.backups import NAME, forge, frames, make, names, one_of_each_state, put
from tests.lib.channels import NOW, many

ROOT = Path(__file__).parents[2]
COPY = """
import sys
from pathlib import Path
from paychan.store.backup import create as backup
backup.copy(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture
def made(backend: Backend, tmp_path: Path) -> Path:
    """A backup of one channel in each state."""
    return make(backend, tmp_path / "backups", one_of_each_state())


# --- creating -------------------------------------------------------------------------------------------------------


def test_a_backup_describes_its_content(made: Path) -> None:
    """Name, mode and manifest: counts by state, and the satoshi whose settlement is not final."""
    channels = one_of_each_state()

    assert made.name == NAME
    assert oct(made.stat().st_mode)[-3:] == "600"
    assert oct(made.parent.stat().st_mode)[-3:] == "700"
    manifest = backup.verify(made)
    assert manifest == Manifest(
        format=1,
        network=NETWORK,
        created_at=NOW,
        paychan=manifest.paychan,
        records=len(State),
        states={state.value: 1 for state in State},
        unsettled_sat=sum(
            channel.received_sat
            for channel in channels
            if channel.state not in (State.CLOSED, State.LOST, State.UNFUNDED)
        ),
        sha256=hashlib.sha256(b"".join(frames(made))).hexdigest(),
    )
    assert sorted(read_records(made)) == sorted(map(encode_record, channels))


async def test_a_backup_under_load_is_one_moment(store: Store, tmp_path: Path) -> None:
    """While channels change together without pause, a backup holds them all at one version."""
    channels = many(2_000)
    await put(store, *channels)
    done = False

    async def write() -> None:
        old = channels
        while not done:
            new = [msgspec.structs.replace(channel, seq=channel.seq + 1) for channel in old]
            assert all(await store.commit([Change(*pair) for pair in zip(old, new, strict=True)]))
            old = new

    writer = asyncio.ensure_future(write())
    seqs = set()
    for second in range(5):
        path, manifest = await asyncio.to_thread(
            backup.create, store.snapshot, tmp_path, NETWORK, UnixTime(NOW + second)
        )
        assert manifest == await asyncio.to_thread(backup.verify, path)
        found = {decode_record(raw).seq for raw in read_records(path)}
        assert len(found) == 1
        assert manifest.records == len(channels)
        seqs |= found
    done = True
    await writer
    assert len(seqs) > 1, "nothing was written meanwhile"


def test_a_backup_is_never_overwritten(made: Path, backend: Backend) -> None:
    """A second backup in the same second is refused, and the first stays unchanged."""
    before = made.read_bytes()

    with pytest.raises(BackupError, match=f"{NAME} exists"):
        make(backend, made.parent, [])
    assert made.read_bytes() == before
    assert names(made.parent) == [NAME]


def test_no_backup_of_a_damaged_record(made: Path, backend: Backend) -> None:
    """A damaged record makes the backup fail without a file, instead of being copied."""
    made.unlink()
    backend.put_raw(one_of_each_state()[1].outpoint, b"rotten")

    with pytest.raises(BackupError, match="damaged"):
        make(backend, made.parent, [])
    assert names(made.parent) == []


def test_an_empty_store_has_a_backup(backend: Backend, tmp_path: Path) -> None:
    """An empty store gives a valid backup."""
    assert backup.verify(make(backend, tmp_path, [])).records == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: no kill at a system call")
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_killed_backup_is_no_backup(made: Path, call: str) -> None:
    """A backup that is killed before its bytes are on disk, or before it has its name, is not listed."""
    copies = made.parent / "copies"
    part = copies / f"{NAME}.part"
    strace = ["strace", "-qq", "-f", "-o", "/dev/null", f"-einject={call}:signal=KILL", f"-P{part}"]
    command = [sys.executable, "-c", COPY, made, copies]
    subprocess.run([*strace, *command], cwd=ROOT, check=False)
    assert names(copies) == [part.name]
    assert backup.listing(copies) == []
    with pytest.raises(BackupError, match="was interrupted; if none is running, remove it"):
        backup.copy(made, copies)

    part.unlink()
    subprocess.run(command, cwd=ROOT, check=True)
    assert names(copies) == [NAME]


# --- verifying ------------------------------------------------------------------------------------------------------


def test_threat_12_any_flipped_byte_is_found(made: Path) -> None:
    """One changed bit at any position of the file, including zip's own headers, fails verification (threat 12)."""
    whole, chance = made.read_bytes(), random.Random(3)
    framing = [*range(50), *range(len(whole) - 400, len(whole))]  # zip's headers, the manifest's end, the seal
    for position in (*framing, *chance.sample(range(len(whole)), 500)):
        changed = bytearray(whole)
        changed[position] ^= 1 << chance.randrange(8)
        made.write_bytes(changed)
        with pytest.raises(BackupError):
            backup.verify(made)


def test_any_truncation_and_any_tail_is_found(made: Path) -> None:
    """A file truncated at any length, or with any bytes appended, fails verification."""
    whole = made.read_bytes()
    sizes = (*range(200), *range(200, len(whole), 7), len(whole) - 1)
    for changed in (*(whole[:size] for size in sizes), whole + b"\x00", whole + whole):
        made.write_bytes(changed)
        with pytest.raises(BackupError):
            backup.verify(made)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"records": 7}, "records is 6, the manifest says 7"),
        ({"states": {"open": 5}}, "states is"),
        ({"unsettled_sat": 1}, "unsettled_sat is 30000, the manifest says 1"),
        ({"sha256": "00" * 32}, "sha256 of the records is"),
        ({"format": 2}, "has backup format 2, this program reads 1"),
        ({"format": None}, "has backup format None"),
        ({"records": "5"}, "has a manifest that can't be read"),
        ({"more": 1}, "has a manifest that can't be read"),
    ],
)
def test_a_manifest_that_does_not_fit_is_found(made: Path, changes: dict[str, Any], reason: str) -> None:
    """A sealed file whose manifest contradicts its records fails verification, and the error shows the difference."""
    forged = forge(made, b"".join(frames(made)), **changes)

    with pytest.raises(BackupError, match=reason):
        backup.verify(forged)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"\x00", "last record is truncated"),
        (b"\x00\x00\x00\x09record", "last record is truncated"),
        (b"\x00\x00\x00\x06record", "is damaged: record of 6 bytes has version"),
        (b"\x00\x00\x00\x00", "is damaged: record of 0 bytes"),
    ],
)
def test_a_tail_among_the_records_is_found(made: Path, tail: bytes, reason: str) -> None:
    """Bytes behind the last record that are no whole record fail verification, even if seal and manifest agree."""
    forged = forge(made, b"".join(frames(made)) + tail)

    with pytest.raises(BackupError, match=reason):
        backup.verify(forged)


@pytest.mark.parametrize("content", [b"", b"x" * 10_000, b"PK\x05\x06" + bytes(18)])
def test_another_file_is_no_backup(tmp_path: Path, content: bytes) -> None:
    """Any other file is refused in one sentence, also by the listing."""
    path = tmp_path / "some.backup"
    path.write_bytes(content)

    with pytest.raises(BackupError):
        backup.verify(path)
    with pytest.raises(BackupError):
        read_manifest(path)
    assert [(found, type(manifest)) for found, manifest in backup.listing(tmp_path)] == [(path, BackupError)]


def test_listing_is_by_time(backend: Backend, tmp_path: Path) -> None:
    """Backups are listed oldest first, independent of their networks' names."""
    first, second, third = (make(backend, tmp_path, [], UnixTime(NOW + seconds)) for seconds in range(3))
    second = second.rename(tmp_path / second.name.replace(NETWORK, "another"))

    assert [path for path, _ in backup.listing(tmp_path)] == [first, second, third]


def test_a_copy_is_verified(made: Path, tmp_path: Path) -> None:
    """A copy is the same file with the same mode; copying a damaged backup is reported."""
    copied, _ = backup.copy(made, tmp_path / "first")
    assert copied.read_bytes() == made.read_bytes()
    assert oct(copied.stat().st_mode)[-3:] == "600"
    with pytest.raises(BackupError, match="exists"):
        backup.copy(made, tmp_path / "first")

    made.write_bytes(made.read_bytes()[:-1])
    with pytest.raises(BackupError, match="damaged or truncated"):
        backup.copy(made, tmp_path / "second")
