"""Rebuilding a damaged store at start: channels that can still be read must be settled before they expire.

LevelDB accepts no more writes as soon as it has to compact a damaged block, so a damaged store can't stay in use, and a
start that only refuses it settles nothing. All readable records go through a salvage into a fresh store, marked as
restored: the server then asks the signer for newer payments and settlements, as after a restore. Nothing is deleted:
the damaged directory gets another name, and as long as it is there, `/health` has an alarm.
"""

from __future__ import annotations

import errno
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import plyvel

from paychan.protocol.types import UnixTime
from paychan.shared.leveldb_files import error_text, sync_directory
from paychan.shared.mounts import fresh_place, inner_place, rename_store
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError
from paychan.store.backup.salvage import Salvaged, salvage
from paychan.store.leveldb.writer import Announce

_REPORT = "SALVAGED"
"""File in the damaged directory: a summary, then what is lost, a line each."""

_COPIES = 4
"""Two copies while salvaging, the backup and the fresh store."""


def rebuild(path: Path, backups: Path, network: str, now: UnixTime, announce: Announce | None = None) -> str:
    """Replace a damaged store by a fresh one with all readable records; return a summary. Blocks.

    `announce` makes the messages to the application, see `create.restore`: those that waited are lost.

    Raises:
        BackupError: no record could be read; the store is unchanged.
        StoreFailed: the store is in use.
        OSError: no room, or a file could not be read or written; the store is unchanged.
    """
    place = inner_place(path)
    _check_room(path, place.parent, backups)
    fresh = fresh_place(place)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        salvaged = salvage(path, backups, network, now, lambda _: None)
    except plyvel.Error as error:
        raise BackupError(error_text(error)) from error
    if not salvaged.manifest.records:
        msg = f"no record could be read from {path}"
        raise BackupError(msg)
    backup.restore(salvaged.path, fresh, network, announce=announce)
    summary = _summary(salvaged)
    (path / _REPORT).write_text("\n".join([summary, *_losses(salvaged)]) + "\n")
    rename_store(path, f".damaged-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}")
    finish_rebuild(place)
    return summary


def finish_rebuild(path: Path) -> None:
    """Give the fresh store its name. Called at each start: a power cut may have ended the last one just before this."""
    fresh = fresh_place(path)
    if fresh.exists() and not path.exists():
        fresh.rename(path)
        sync_directory(path.parent)


def set_aside(path: Path) -> list[tuple[Path, str]]:
    """Return the damaged directories that stores at this path were rebuilt from, with the summary of each."""
    return [(aside, _first_line(aside / _REPORT)) for aside in sorted(path.parent.glob(f"{path.name}.damaged-*"))]


def _check_room(path: Path, parent: Path, backups: Path) -> None:
    """Refuse to begin without room for all copies: a full disk stops the signer, too."""
    backups.mkdir(mode=0o700, parents=True, exist_ok=True)
    needed = _COPIES * sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for place in (parent, backups):
        if shutil.disk_usage(place).free < needed:
            raise OSError(
                errno.ENOSPC, f"rebuilding needs {needed:,} free bytes: {os.strerror(errno.ENOSPC)}", str(place)
            )


def _summary(salvaged: Salvaged) -> str:
    lost = {*salvaged.damaged, *salvaged.missing} - {*salvaged.older}
    return (
        f"channels: {salvaged.manifest.records:,}, {len(salvaged.older):,} of them with an older record; "
        f"channels known to be lost: {len(lost):,}; notes of LevelDB: {len(salvaged.notes):,}"
    )


def _losses(salvaged: Salvaged) -> list[str]:
    return [
        f"backup {salvaged.path}",
        *(f"damaged {outpoint}" for outpoint in salvaged.damaged),
        *(f"missing {outpoint}" for outpoint in salvaged.missing),
        *(f"older {outpoint}" for outpoint in salvaged.older),
        *(f"LevelDB {note}" for note in salvaged.notes),
    ]


def _first_line(report: Path) -> str:
    try:
        return report.read_text(errors="replace").partition("\n")[0]
    except OSError:
        return "no summary"
