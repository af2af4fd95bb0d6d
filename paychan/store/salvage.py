"""Salvage: a backup of every record that can still be read out of a damaged store.

The damaged directory is evidence and stays as it is. LevelDB's own repair works on a copy: it reads every log and table,
whatever MANIFEST and CURRENT say, and keeps what has a right checksum. Each record is then checked by its own checksum, the
newest version of each channel is kept, and the index is made anew when the backup is restored.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import plyvel
from msgspec import Struct

from paychan.protocol.record import DamagedRecord, decode_record
from paychan.protocol.types import OutPoint, UnixTime
from paychan.store import backup
from paychan.store.backupfile import BackupError, Manifest, Progress
from paychan.store.leveldb import INDEX, OUTPOINT_BYTES, RECORD
from paychan.store.leveldbdirectory import copy_of, error_text

_NOTES = re.compile(r"(?:Log|Table) #\d+: (?!.* OK$).*")
"""Lines of LevelDB's own protocol of a repair that tell of a log or table that was not read to its end."""


class Salvaged(Struct, frozen=True):
    """What was found: the backup, and what is not in it."""

    path: Path
    manifest: Manifest
    damaged: tuple[str, ...]
    """Outpoints whose record fails its checksum."""
    missing: tuple[str, ...]
    """Outpoints that the index names and that have no record."""
    notes: tuple[str, ...]
    """What LevelDB dropped: bytes of logs, whole tables."""


def salvage(store: Path, directory: Path, network: str, now: UnixTime, progress: Progress) -> Salvaged:
    """Write a backup of what can be read out of a store that need not open; the store is only read.

    Raises:
        BackupError: nothing is there, the store is in use, or nothing could be read.
        OSError: the copy or the backup could not be written.
    """
    with TemporaryDirectory(prefix=".salvage.", dir=_made(directory)) as work:
        copy = Path(work) / "store"
        copy_of(store, copy)
        notes = _repair(copy, store)
        database = plyvel.DB(str(copy), create_if_missing=False, paranoid_checks=False)
        try:
            damaged, missing = _examine(database)

            @contextmanager
            def good_records() -> Iterator[Iterator[bytes]]:
                yield _good(database)

            path, manifest = backup.create(good_records, directory, network, now, progress)
        finally:
            database.close()
    return Salvaged(path, manifest, damaged, missing, notes)


def _made(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _repair(copy: Path, store: Path) -> tuple[str, ...]:
    shutil.rmtree(copy / "lost", ignore_errors=True)
    for name in ("LOG", "LOG.old", "LOCK", "OWNER"):
        (copy / name).unlink(missing_ok=True)
    try:
        plyvel.repair_db(str(copy), paranoid_checks=False)
    except plyvel.Error as error:
        msg = f"nothing could be read out of {store}: {error_text(error)}"
        raise BackupError(msg) from error
    lines = (copy / "LOG").read_text(errors="replace").splitlines() if (copy / "LOG").exists() else []
    return tuple(found[0] for line in lines if (found := _NOTES.search(line)))


def _examine(database: plyvel.DB) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the damaged records, and the channels that only the index knows."""
    damaged, present = [], set[bytes]()
    for key, raw in _entries(database, RECORD):
        present.add(key[1:])
        if not _is_good(raw):
            damaged.append(_shown(key[1:]))
    indexed = {key[-OUTPOINT_BYTES:] for key, _ in _entries(database, INDEX)}
    return tuple(damaged), tuple(sorted(_shown(outpoint) for outpoint in indexed - present))


def _good(database: plyvel.DB) -> Iterator[bytes]:
    return (raw for _, raw in _entries(database, RECORD) if _is_good(raw))


def _entries(database: plyvel.DB, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    with database.iterator(start=prefix, stop=bytes([prefix[0] + 1]), fill_cache=False) as entries:
        yield from entries


def _is_good(raw: bytes) -> bool:
    try:
        decode_record(raw)
    except DamagedRecord:
        return False
    return True


def _shown(outpoint: bytes) -> str:
    if len(outpoint) != OUTPOINT_BYTES:
        return outpoint.hex()
    return str(OutPoint(outpoint[:32], int.from_bytes(outpoint[32:], "little")))
