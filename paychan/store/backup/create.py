"""Backups: all channels of one moment in one file, written from any backend's snapshot, restored into any store.

Called by the management interface and by `paychan backup`. The functions block and belong in a worker thread. A file or
store appears under its name only when it is complete.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from msgspec.structs import replace

from paychan.protocol.types import UnixTime
from paychan.shared.leveldb_files import sync_directory
from paychan.store.backup.archive import (
    SEAL_BYTES,
    BackupError,
    Manifest,
    Progress,
    Tally,
    decoded,
    digest_to_seal,
    framed,
    read_manifest,
    read_records,
    write_archive,
)
from paychan.store.base import Change, Store
from paychan.store.leveldb.directory import check_unused
from paychan.store.leveldb.store import LevelDbStore
from paychan.store.leveldb.writer import Announce

SUFFIX = ".backup"

_BATCH = 1000
"""Records per commit during a restore, and records between two calls of `Progress`."""

Snapshot = Callable[[], AbstractContextManager[Iterator[bytes]]]
"""The method `Store.snapshot`."""


def _silent(_done: int) -> None:
    """Ignore the progress."""


def create(
    snapshot: Snapshot, directory: Path, network: str, now: UnixTime, progress: Progress = _silent
) -> tuple[Path, Manifest]:
    """Write `paychan-<network>-<UTC time>.backup` into a directory, readable only by this user; return path and manifest.

    Raises:
        BackupError: a stored record is damaged, or a backup of the same second exists.
        StoreFailed, OSError: the store could not be read, or the file could not be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"paychan-{network}-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}{SUFFIX}"
    with new_file(path) as file, snapshot() as records:
        manifest = write_archive(file, records, network, now, progress)
    return path, manifest


def check_directory(path: Path) -> None:
    """Check that a directory can be written, or can be made, before any work. Raises OSError."""
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file with mode 0600 that gets its name when it is complete and on disk; it never replaces another file.

    Raises:
        BackupError: the file exists, or is being written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        msg = f"{part} exists: a backup is being written there, or was interrupted; if none is running, remove it"
        raise BackupError(msg) from None
    try:
        with os.fdopen(descriptor, "w+b") as file:
            _refuse_existing(
                path
            )  # the .part file reserves the name: no other process creates this file before the rename
            yield file
            file.flush()
            os.fsync(descriptor)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        msg = f"{path} exists and is not overwritten; try again in a second"
        raise BackupError(msg)


def verify(path: Path, progress: Progress = _silent) -> Manifest:
    """Read a backup completely, and check all that can be checked without a store.

    Raises:
        BackupError: the file is not exactly what `create` wrote.
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        if digest_to_seal(file) != file.read(SEAL_BYTES):
            msg = f"{path} is damaged or truncated: its seal does not match; use another backup"
            raise BackupError(msg)
    manifest, tally, digest = read_manifest(path), Tally(), hashlib.sha256()
    for raw in read_records(path):
        digest.update(framed(raw))
        tally.add(decoded(path, raw))
        if not tally.records % _BATCH:
            progress(tally.records)
    problem = tally.differs(manifest)
    if problem is None and digest.hexdigest() != manifest.sha256:
        problem = f"sha256 of the records is {digest.hexdigest()}, the manifest says {manifest.sha256}"
    if problem is not None:
        msg = f"{path} contradicts itself: {problem}; use another backup"
        raise BackupError(msg)
    return manifest


def restore(
    path: Path, target: Path, network: str, progress: Progress = _silent, announce: Announce | None = None
) -> Manifest:
    """Create a LevelDB store from a verified backup; the target directory must be missing or empty.

    `announce` returns the messages to the application that are written with each channel.

    Raises:
        BackupError: see `verify`; the backup is of another network; a file is in the way.
        StoreFailed, OSError: a process has a store open there, or the store could not be written.
    """
    manifest = verify(path)
    if manifest.network != network:
        msg = f"{path} holds channels of the {manifest.network} network, the configuration says {network}"
        raise BackupError(msg)
    if target.exists() and any(target.iterdir()):
        check_unused(target)
        msg = f"{target} is not empty and is not overwritten: move it away, or configure another store"
        raise BackupError(msg)
    work = target.with_name(f".{target.name}.restoring")
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        work.mkdir(mode=0o700)
    except FileExistsError:
        msg = f"{work} is left from an interrupted restore, or a restore is running; if none is, remove it"
        raise BackupError(msg) from None
    try:
        asyncio.run(_fill(path, work / "store", network, progress, announce))
        sync_directory(work / "store")
        (work / "store").rename(target)  # fails if another process created something there meanwhile
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sync_directory(target.parent)
    return manifest


async def _fill(path: Path, directory: Path, network: str, progress: Progress, announce: Announce | None) -> None:
    store = LevelDbStore.open(directory, network)
    if announce is not None:
        store.announce_by(announce)
    try:
        await load(path, store, progress)
    finally:
        await store.close()


async def load(path: Path, store: Store, progress: Progress) -> None:
    """Write every channel of a backup, marked as restored, into a store that holds none of them.

    Raises:
        BackupError: an outpoint occurs twice, or is already in the store; earlier writes remain.
        StoreFailed: the store could not be written.
    """
    done, batch = 0, list[Change]()

    async def flush() -> None:
        nonlocal done
        if not all(await store.commit(batch)):
            msg = f"{path} holds a channel that is already in the store"
            raise BackupError(msg)
        done += len(batch)
        batch.clear()
        progress(done)

    for raw in read_records(path):
        batch.append(Change(None, replace(decoded(path, raw), restored=True)))
        if len(batch) == _BATCH:
            await flush()
    await flush()


def copy(path: Path, directory: Path) -> tuple[Path, Manifest]:
    """Copy a backup into another directory under the same name, and verify the copy.

    Raises:
        BackupError: see `verify`; a file of that name exists there.
        OSError: the backup could not be copied.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = directory / path.name
    with path.open("rb") as source, new_file(target) as file:
        shutil.copyfileobj(source, file)
    return target, verify(target)


def newest(directory: Path, network: str) -> tuple[Path, Manifest] | None:
    """Return the newest backup of a network in a directory by its manifest, which is not verified; None without one."""
    for path in sorted(directory.glob(f"paychan-{network}-*{SUFFIX}"), reverse=True):
        with suppress(BackupError, OSError):
            return path, read_manifest(path)
    return None


def prune(directory: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` readable backups of each network; return the removed ones, oldest first.

    Raises:
        OSError: a file could not be removed.
    """
    readable = [(path, found.network) for path, found in listing(directory) if isinstance(found, Manifest)]
    removed = list[Path]()
    for network in dict.fromkeys(name for _, name in readable):
        removed += [path for path, name in readable if name == network][:-keep]
    for path in removed:
        path.unlink()
    sync_directory(directory)
    return removed


def listing(directory: Path) -> list[tuple[Path, Manifest | BackupError]]:
    """List the backups of a directory, oldest first, with their manifests; `verify` checks that a manifest is true."""
    found: list[tuple[Path, Manifest | BackupError]] = []
    for path in sorted(directory.glob(f"*{SUFFIX}"), key=lambda path: path.name.split("-")[-1]):
        try:
            found.append((path, read_manifest(path)))
        except BackupError as error:
            found.append((path, error))
    return found
