"""Ends a committing process in every hard way: acknowledged commits survive, and no commit survives in part.

Threats 11 and 12. `kill -9` keeps the kernel's cache, so it proves order and atomicity; the power cut loses unsynced
data, and proves that an acknowledgement means a write to the disk.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from paychan.store.leveldb.store import LevelDbStore
from tests.lib.storewriter import GROUP_SIZES, NETWORK, found_seqs

ROOT = Path(__file__).parents[2]
WRITER = [sys.executable, "-m", "tests.lib.storewriter"]
ROUNDS = 20

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: no failing syscalls")


@contextmanager
def writing(directory: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A process that commits into a directory, optionally under strace; it is killed, and its locks are gone, at the end."""
    with subprocess.Popen([*before, *WRITER, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        writer = int(process.stdout.readline().removeprefix("process "))
        try:
            yield process
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(writer, signal.SIGKILL)  # strace ends after the traced process


def acknowledged(lines: list[str], seqs: list[int]) -> list[int]:
    """Return the newest acknowledged version of each group; a truncated last line is not counted."""
    for line in lines:
        if numbers := re.fullmatch(r"(\d+) (\d+)\n", line):
            seqs[int(numbers[1])] = int(numbers[2])
    return seqs


def check(directory: Path, acked: list[int], begun: list[int] | None = None) -> list[int]:
    """Open the remaining store: every acknowledged commit is there, and beyond `begun` at most the one in flight."""
    found = asyncio.run(_look(directory))
    assert all(got >= want for got, want in zip(found, acked, strict=True)), f"acknowledged {acked}, found {found}"
    assert sum(found) <= sum(begun or acked) + 1, f"begun {begun or acked}, found {found}"
    return found


async def _look(directory: Path) -> list[int]:
    store = LevelDbStore.open(directory, NETWORK, create=False)
    try:
        return await found_seqs(store)
    finally:
        await store.close()


def test_kill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Killed twenty times at any moment, the store has every acknowledged commit, and each commit whole or not at all."""
    store, moments, acked = tmp_path / "store", random.Random(11), [0] * len(GROUP_SIZES)
    for _ in range(ROUNDS):
        with writing(store) as process:
            assert process.stdout
            lines = [process.stdout.readline() for _ in range(moments.randrange(1, 120))]
            process.kill()
            lines += process.stdout.readlines()
        acked = check(store, acknowledged(lines, acked))

    assert min(acked) > ROUNDS


@needs_strace
@pytest.mark.parametrize("nth", [1, 2, 9, 10, 11, 12, 30])
def test_kill_at_a_sync_loses_nothing_acknowledged(tmp_path: Path, nth: int) -> None:
    """Killed at its n-th sync, also during the creation of the store, it leaves a whole store or none."""
    store = tmp_path / "store"
    with writing(
        store, "strace", "-qq", "-f", "-o", "/dev/null", f"-einject=fdatasync:signal=KILL:when={nth}"
    ) as process:
        assert process.stdout
        lines = process.stdout.readlines()
    acked = acknowledged(lines, [0] * len(GROUP_SIZES))
    if store.exists() or any(acked):
        check(store, acked)


@needs_strace
def test_a_failed_sync_ends_all_writing(tmp_path: Path) -> None:
    """After one failed sync, no commit succeeds in that process, although the disk works again; nothing is lost."""
    store = tmp_path / "store"
    lines = []
    with writing(store, "strace", "-qq", "-f", "-o", "/dev/null", "-einject=fdatasync:error=EIO:when=40") as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if sum(line.startswith("failed") for line in lines) == 5:
                break
    first = next(number for number, line in enumerate(lines) if line.startswith("failed"))

    assert first > 0
    assert "Input/output error" in lines[first]
    assert all(line.startswith("failed: an earlier write failed") for line in lines[first + 1 :])
    check(store, acknowledged(lines, [0] * len(GROUP_SIZES)))


@needs_strace
def test_nothing_is_acknowledged_before_its_sync(tmp_path: Path) -> None:
    """In the order of system calls, a sync of the log returns between any two acknowledgements."""
    trace = tmp_path / "trace"
    with writing(tmp_path / "store", "strace", "-qq", "-f", "-o", str(trace), "-etrace=write,fdatasync") as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(40)]
    synced, acknowledgements = False, 0
    for line in trace.read_text().splitlines():
        if re.search(r"fdatasync.* = 0$", line):
            synced = True
        elif re.search(r'write\(1, "\d+ \d+\\n"', line):
            assert synced, f"acknowledgement {acknowledgements + 1} without a sync"
            synced, acknowledgements = False, acknowledgements + 1

    assert acknowledgements >= len(lines)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None, reason="no root or no mkfs.ext4: no power cut"
)
def test_power_cut_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """An image of the disk copied under a committing process holds every acknowledged commit: none was only cached."""
    disk, copy, mount = tmp_path / "disk", tmp_path / "copy", tmp_path / "mount"
    mount.mkdir()
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    acked = [0] * len(GROUP_SIZES)
    if subprocess.run(["mount", "-o", "loop", disk, mount], check=False).returncode:
        pytest.skip("no loop devices: no power cut")
    try:
        with writing(mount / "store") as process:
            assert process.stdout
            acked = acknowledged([process.stdout.readline() for _ in range(300)], acked)
            process.send_signal(signal.SIGSTOP)  # the copy takes a while, unlike a power cut
            shutil.copyfile(disk, copy)
            process.kill()
            rest = acknowledged(process.stdout.readlines(), acked.copy())
    finally:
        subprocess.run(["umount", mount], check=True)
    subprocess.run(["mount", "-o", "loop", copy, mount], check=True)
    try:
        found = check(mount / "store", acked, rest)
    finally:
        subprocess.run(["umount", mount], check=True)

    assert sum(found) >= 300
