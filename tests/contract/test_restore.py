"""Restoring: the complete store under its name, or nothing."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from paychan.protocol.channel import State
from paychan.protocol.record import decode_record
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError, read_manifest
from paychan.store.base import StoreFailed
from tests.contract.backends import NETWORK, Backend
from tests.contract.backups import forge, frames, make, names, one_of_each_state, stored

ROOT = Path(__file__).parents[2]
RESTORE = """
import sys
from pathlib import Path
from paychan.store.backup import create as backup
backup.restore(Path(sys.argv[1]), Path(sys.argv[2]), "test")
"""


@pytest.fixture
def made(backend: Backend, tmp_path: Path) -> Path:
    """A backup of one channel in each state."""
    return make(backend, tmp_path / "backups", one_of_each_state())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory to restore into."""
    path = tmp_path / "place"
    path.mkdir()
    return path


def test_restored_channels_are_the_same(made: Path, place: Path) -> None:
    """A channel of every state is restored field by field, also in the index; missing directories are created.

    Each is marked as restored (fault 15): the application may have accepted payments that the backup lacks.
    """
    backup.restore(made, place / "deep" / "store", NETWORK)

    expected = {channel.state: [replace(channel, restored=True)] for channel in one_of_each_state()}
    assert stored(place / "deep" / "store") == expected
    assert names(place / "deep") == ["store"]


def test_an_empty_directory_is_no_obstacle(made: Path, place: Path) -> None:
    """A mount point or an existing empty directory is used for the store."""
    (place / "store").mkdir()
    backup.restore(made, place / "store", NETWORK)

    assert stored(place / "store")[State.OPEN]


def test_a_store_is_not_overwritten(made: Path, place: Path) -> None:
    """All files in the target directory stay, and nothing is restored."""
    (place / "store").mkdir()
    (place / "store" / "precious").touch()

    with pytest.raises(BackupError, match="not empty"):
        backup.restore(made, place / "store", NETWORK)
    assert (names(place), names(place / "store")) == (["store"], ["precious"])


def test_another_network_is_not_restored(made: Path, place: Path) -> None:
    """Channels of one network are never restored into another."""
    with pytest.raises(BackupError, match="of the test network, the configuration says live"):
        backup.restore(made, place / "store", "live")
    assert names(place) == []


def test_a_damaged_backup_is_not_restored(made: Path, place: Path) -> None:
    """A backup is verified before any write."""
    made.write_bytes(made.read_bytes()[:-1])

    with pytest.raises(BackupError, match="seal"):
        backup.restore(made, place / "store", NETWORK)
    assert names(place) == []


def test_a_duplicate_channel_is_not_restored(made: Path, place: Path) -> None:
    """Two records of one outpoint can't come from one moment of a store: nothing of such a backup is kept."""
    manifest, records = read_manifest(made), frames(made)
    twice = next(record for record in records if decode_record(record[4:]).state is State.LOST)
    states = {**manifest.states, "lost": 2}
    forged = forge(made, b"".join([*records, twice]), records=len(records) + 1, states=states)
    assert backup.verify(forged).records == len(records) + 1

    with pytest.raises(BackupError, match="already in the store"):
        backup.restore(forged, place / "store", NETWORK)
    assert names(place) == []


def test_a_failed_restore_leaves_nothing(made: Path, place: Path) -> None:
    """If the disk is full, neither a store nor a partial directory remains."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # bytes per file; Python ignores SIGXFSZ, so writes fail
    try:
        with pytest.raises(StoreFailed, match="File too large"):
            backup.restore(made, place / "store", NETWORK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(place) == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: no kill at a system call")
@pytest.mark.parametrize("call", ["fdatasync", "fsync", "rename,renameat,renameat2"])
def test_a_killed_restore_leaves_no_partial_store(made: Path, place: Path, call: str) -> None:
    """Killed at any of its syncs and renames, a restore leaves no store or a complete one, and names the leftovers."""
    store, whole = place / "store", 0
    for nth in range(1, 30):
        strace = ["strace", "-qq", "-f", "-o", "/dev/null", f"-einject={call}:signal=KILL:when={nth}"]
        killed = subprocess.run([*strace, sys.executable, "-c", RESTORE, made, store], cwd=ROOT, check=False)
        if store.exists():
            assert stored(store) == {
                channel.state: [replace(channel, restored=True)] for channel in one_of_each_state()
            }
            whole += 1
        elif left := list(place.iterdir()):
            with pytest.raises(BackupError, match=re.escape(f"{left[0]} is left from an interrupted restore")):
                backup.restore(made, store, NETWORK)
        for path in place.iterdir():
            shutil.rmtree(path)
        if killed.returncode == 0:
            break
    assert nth > 2, "no process was killed"
    assert whole
