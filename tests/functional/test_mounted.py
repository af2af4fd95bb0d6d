"""State directories that are mount points, as containers have them: start, restart, backup, restore and rebuild work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from paychan.shared.mounts import is_mount_point, store_place
from tests.functional.test_damaged_store import flip, opened, store_alarms
from tests.lib.system import System

_PAYCHAN = Path(sys.executable).with_name("paychan")

Mount = Callable[[Path], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mount a fresh directory at a path, and return the path. Such mounts look like no mount to `os.path.ismount`."""
    with ExitStack() as mounted:

        def at(path: Path) -> Path:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            source = tmp_path / "disks" / str(path.relative_to(tmp_path)).replace("/", "_")
            source.mkdir(mode=0o700, parents=True, exist_ok=True)
            done = subprocess.run(["mount", "--bind", source, path], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no right to mount: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", "--lazy", path], check=True)
            return path

        yield at


def system_with(store: Path, tmp_path: Path) -> System:
    return System(tmp_path / "system", sections={"store": f'path = "{store}"'})


def channels(system: System) -> set[str]:
    listed = system.manage("GET", "/channels?limit=1000").json()["channels"]
    return {channel["funding_source"] for channel in listed}


def open_channels(system: System, number: int) -> set[str]:
    with httpx.Client(timeout=30, trust_env=False, verify=False) as http:
        return {str(outpoint) for outpoint in opened(system, http, number)}


def stop(system: System) -> None:
    assert system.server is not None
    assert system.server.stop() == 0, system.server.text()


def paychan(*words: object) -> str:
    done = subprocess.run([_PAYCHAN, *map(str, words)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_fault_40_every_state_directory_may_be_a_mount_point(tmp_path: Path, mount: Mount) -> None:
    """Store, backups, state directory and ledger are mounts; lost+found of a filesystem is in the way of nothing."""
    store = mount(tmp_path / "a volume" / "store")
    (store / "lost+found").mkdir(mode=0o000)
    system = system_with(store, tmp_path)
    state = mount(system.state)
    mount(state / "signer.ledger")
    mount(state / "backups")
    with system:
        known = open_channels(system, 3)
        system.restart_server()
        assert channels(system) == known
        assert store_alarms(system) == []
        backup = Path(system.manage("POST", "/backups").json()["path"])
        stop(system)
        assert is_mount_point(store)
        assert store_place(store) == store / "store"
        assert (store / "store.reserve").exists()
        assert (state / "signer.ledger" / "signer.ledger.reserve").exists()

        for file in store.glob("*store*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        paychan("backup", "restore", system.server_file, backup)
        system.start_server()
        assert channels(system) == known


def test_fault_40_an_existing_store_may_be_mounted(tmp_path: Path, mount: Mount) -> None:
    """A store that was made elsewhere and is mounted directly stays where it is, also without the mount."""
    store = tmp_path / "store"
    with system_with(store, tmp_path) as system:
        known = open_channels(system, 3)
        stop(system)
        disk = tmp_path / "disks" / "store"
        disk.parent.mkdir()
        store.rename(disk)
        mount(store)
        system.start_server()
        assert channels(system) == known
        assert store_place(store) == store


def test_fault_40_a_damaged_store_in_a_mount_point_is_rebuilt(tmp_path: Path, mount: Mount) -> None:
    """Its files go into a directory below the mount point, the new store into another; both stay at the next start."""
    store = tmp_path / "store"
    with system_with(store, tmp_path) as system:
        known = open_channels(system, 40)
        system.restart_server()  # the log becomes a table
        stop(system)
        disk = tmp_path / "disks" / "store"
        disk.parent.mkdir()
        store.rename(disk)
        mount(store)
        flip(store, 50)
        (store / "DAMAGED").write_text("a block can't be read\n")

        for _ in range(2):
            system.start_server()
            found = channels(system)
            assert found < known
            assert len(found) > len(known) // 4
            (aside,) = store.glob("store.damaged-*")
            assert any(str(aside) in alarm["text"] for alarm in store_alarms(system))
            assert (aside / "CURRENT").exists()
            assert not (store / "CURRENT").exists()
            stop(system)

        shutil.rmtree(aside)
        flip(store / "store", 50)
        (store / "store" / "DAMAGED").write_text("a block can't be read\n")
        system.start_server()
        assert store.joinpath("store", "CURRENT").exists()
        assert len(list(store.glob("store.damaged-*"))) == 1


def test_a_store_without_current_in_a_mount_point_is_no_empty_one(tmp_path: Path, mount: Mount) -> None:
    """Remains of a store directly in a mount point are damage; no new store begins below them."""
    store = mount(tmp_path / "store")
    (store / "000005.ldb").write_bytes(b"remains")

    assert store_place(store) == store


def test_a_path_with_spaces_is_recognised(tmp_path: Path, mount: Mount) -> None:
    """The kernel writes such paths in octal."""
    place = mount(tmp_path / "a\\b c")

    assert is_mount_point(place)
    assert not is_mount_point(place.parent)
