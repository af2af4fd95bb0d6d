"""Salvage: a backup of every record that is still readable in a damaged store.

The damaged directory is evidence and stays unchanged. LevelDB's own repair runs on a copy: it reads every log and
table, independent of MANIFEST and CURRENT, and keeps the newest version of each record. That alone loses channels: a
damaged newest version hides an intact older one, and the repair skips the rest of a damaged block of a log. So this
module also reads the logs, and searches the tables for an older record of each channel whose newest record is damaged.
Each record is checked by its own checksum, the newest intact version of each channel is kept, and a restore of the
backup creates a new index.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import plyvel
from msgspec import Struct

from paychan.protocol.errors import DamagedRecord
from paychan.protocol.record import decode_record, record_seq
from paychan.protocol.types import OutPoint, UnixTime
from paychan.shared.leveldb_files import error_text
from paychan.shared.leveldb_log import puts, whole_writes
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError, Manifest, Progress
from paychan.store.leveldb.directory import copy_of
from paychan.store.leveldb.keys import INDEX, OUTPOINT_BYTES, RECORD

_NOTES = re.compile(r"(?:Log|Table) #\d+: (?!.* OK$).*")
"""Lines of LevelDB's own log of a repair that report a log or table which was not read to its end."""


class Salvaged(Struct, frozen=True):
    """The result of a salvage: the backup, and what it lacks."""

    path: Path
    manifest: Manifest
    damaged: tuple[str, ...]
    """Outpoints whose record fails its checksum."""
    missing: tuple[str, ...]
    """Outpoints that the index names but that have no record."""
    older: tuple[str, ...]
    """Outpoints of both kinds for which the backup holds an older record."""
    notes: tuple[str, ...]
    """Losses reported by LevelDB: bytes of logs, whole tables."""


def salvage(store: Path, directory: Path, network: str, now: UnixTime, progress: Progress) -> Salvaged:
    """Write a backup of the readable records of a store that may not open; the store is only read.

    Raises:
        BackupError: there is no store, the store is in use, or no record could be read.
        OSError: the copy or the backup could not be written.
    """
    with TemporaryDirectory(prefix=".salvage.", dir=_made(directory)) as work:
        copy = Path(work) / "store"
        copy_of(store, copy)
        kept = _logged(copy)
        notes = _repair(copy, store, paranoid=False)
        database = plyvel.DB(str(copy), create_if_missing=False, paranoid_checks=False)
        try:
            damaged, missing = _examine(database)
            missing -= kept.keys()
            kept |= _in_tables(store, Path(work) / "tables", (damaged | missing) - kept.keys())

            @contextmanager
            def good_records() -> Iterator[Iterator[bytes]]:
                yield _good(database, kept)

            path, manifest = backup.create(good_records, directory, network, now, progress)
        finally:
            database.close()
    return Salvaged(path, manifest, _shown(damaged), _shown(missing), _shown((damaged | missing) & kept.keys()), notes)


def _made(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _logged(copy: Path) -> dict[bytes, bytes]:
    """Read the newest intact record of each channel, by outpoint, from the intact parts of the logs."""
    found: dict[bytes, bytes] = {}
    for log in copy.glob("[0-9]*.log"):
        for write in whole_writes(log.read_bytes()):
            for key, raw in puts(write):
                if key[:1] == RECORD and _is_good(key, raw):
                    found[key[1:]] = max(raw, found.get(key[1:], raw), key=record_seq)
    return found


def _in_tables(store: Path, copy: Path, wanted: set[bytes]) -> dict[bytes, bytes]:
    """Search the intact blocks of the tables for records of channels whose newest record can't be read."""
    if not wanted:
        return {}
    copy_of(store, copy)
    for log in copy.glob("[0-9]*.log"):
        log.unlink()
    _repair(copy, store, paranoid=True)
    database = plyvel.DB(str(copy), create_if_missing=False, paranoid_checks=False)
    try:
        found = {outpoint: database.get(RECORD + outpoint) for outpoint in wanted}
    finally:
        database.close()
    return {outpoint: raw for outpoint, raw in found.items() if raw is not None and _is_good(RECORD + outpoint, raw)}


def _repair(copy: Path, store: Path, *, paranoid: bool) -> tuple[str, ...]:
    shutil.rmtree(copy / "lost", ignore_errors=True)
    for name in ("LOG", "LOG.old", "LOCK", "OWNER"):
        (copy / name).unlink(missing_ok=True)
    try:
        plyvel.repair_db(str(copy), paranoid_checks=paranoid)
    except plyvel.Error as error:
        msg = f"no record could be read from {store}: {error_text(error)}"
        raise BackupError(msg) from error
    lines = (copy / "LOG").read_text(errors="replace").splitlines() if (copy / "LOG").exists() else []
    return tuple(found[0] for line in lines if (found := _NOTES.search(line)))


def _examine(database: plyvel.DB) -> tuple[set[bytes], set[bytes]]:
    """Return the damaged records, and the channels that only the index names, by outpoint."""
    damaged, present = set[bytes](), set[bytes]()
    for key, raw in _entries(database, RECORD):
        present.add(key[1:])
        if not _is_good(key, raw):
            damaged.add(key[1:])
    indexed = {key[-OUTPOINT_BYTES:] for key, _ in _entries(database, INDEX)}
    return damaged, indexed - present


def _good(database: plyvel.DB, kept: dict[bytes, bytes]) -> Iterator[bytes]:
    """Yield one record of each channel: the newest intact one of the database's and of `kept`."""
    used = set[bytes]()
    for key, raw in _entries(database, RECORD):
        other = kept.get(key[1:])
        if other is not None:
            used.add(key[1:])
        if _is_good(key, raw):
            yield raw if other is None else max(raw, other, key=record_seq)
        elif other is not None:
            yield other
    yield from (raw for outpoint, raw in kept.items() if outpoint not in used)


def _entries(database: plyvel.DB, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    with database.iterator(start=prefix, stop=bytes([prefix[0] + 1]), fill_cache=False) as entries:
        yield from entries


def _is_good(key: bytes, raw: bytes) -> bool:
    """Return whether a record is intact and belongs to the channel that its key names."""
    try:
        return decode_record(raw).outpoint.serialize() == key[1:]
    except DamagedRecord:
        return False


def _shown(outpoints: Iterable[bytes]) -> tuple[str, ...]:
    return tuple(sorted(map(_outpoint, outpoints)))


def _outpoint(raw: bytes) -> str:
    return str(OutPoint(raw[:32], int.from_bytes(raw[32:], "little"))) if len(raw) == OUTPOINT_BYTES else raw.hex()
