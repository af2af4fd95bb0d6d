"""The directory of a LevelDB store: its options, its lock, and the reasons why it can't be opened.

A mistake here loses every channel at once. So a directory that is not a store of this network and format is refused,
and no new store is created where the remains of one may be.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import plyvel
import structlog

from paychan.shared.called import quoted
from paychan.shared.holders import described
from paychan.shared.leveldb_files import cut_torn_tail, error_text, is_held, sync_directory
from paychan.shared.leveldb_log import log_number
from paychan.store.base import StoreDamaged, StoreFailed

log = structlog.get_logger("store")

FORMAT = 1
"""Version of the key layout. A store of another format is not opened."""

META_KEY = b"z"
"""Key of the entry `<format> <network>`; it sorts behind every other key."""

WRITE_BUFFER_BYTES = 32 << 20

_OPTIONS = {
    # A damaged log is an error at opening; by default LevelDB drops the data behind the damage and continues.
    "paranoid_checks": True,
    # A payment replaces its channel's record, so a larger memory table keeps more superseded versions out of the table
    # files. LevelDB uses up to twice this memory; replaying a full log at start takes 0.4 s.
    "write_buffer_size": WRITE_BUFFER_BYTES,
    # 10 bits a key: for an unused outpoint, 99 % of the look-ups read no block.
    "bloom_filter_bits": 10,
    # Keys, hashes and signatures don't compress; uncompressed blocks come straight from the page cache (3 µs, not 6).
    "compression": None,
    # 10 million channels make about 440 files, all kept open (max_open_files is 1,000), instead of 1,750 of 2 MB.
    "max_file_size": 8 << 20,
}


WHAT_TO_DO = (
    "`paychan backup salvage FILE` writes all readable records into a backup; move the damaged directory away, "
    "then restore that backup"
)


LOCK_NAME = "OWNER"
"""File in a store's directory whose lock excludes other stores; it holds the process id."""

_NOTE = "DAMAGED"
"""File in a store's directory: its content was found to be damaged. LevelDB leaves other files alone."""


def note_damage(path: Path, reason: str) -> None:
    """Leave a note for the next start. Raises `OSError`."""
    note = path / _NOTE
    if not note.exists():
        note.write_text(f"{reason}\n")


def noted_damage(path: Path) -> str:
    """Return why a store is known to be damaged; "": nothing is known."""
    try:
        return (path / _NOTE).read_text(errors="replace").strip() or "damaged"
    except OSError:
        return ""


def open_directory(path: Path, network: str, *, create: bool) -> tuple[plyvel.DB, int]:
    """Open the store in a directory, or create it if there is none and `create` is true.

    The second value is a file descriptor that excludes other stores until it is closed.

    Raises:
        StoreFailed: in use, of another network or format, missing, or not accessible; the message has the remedy.
        StoreDamaged: files are damaged or lost.
    """
    try:
        if not (path / "CURRENT").exists():
            _begin(path, network, create=create)
        lock = _lock(path)
        try:
            return _open(path, network), lock
        except BaseException:
            os.close(lock)
            raise
    except (OSError, plyvel.Error) as error:
        failed = StoreDamaged if isinstance(error, plyvel.CorruptionError) else StoreFailed
        raise failed(_why_not_opened(path, error)) from error


def _check_log(path: Path) -> None:
    """Check that the oldest log that LevelDB needs is there.

    Raises:
        StoreDamaged: it is missing.
        OSError: CURRENT or MANIFEST can't be read.
    """
    manifest = path / (path / "CURRENT").read_text(errors="replace").strip()
    number = log_number(manifest.read_bytes()) if manifest.is_file() else 0  # else LevelDB refuses the store
    if number and not (path / f"{number:06}.log").exists():
        msg = f"{path} is damaged: the log {number:06}.log is missing; {WHAT_TO_DO}"
        raise StoreDamaged(msg)


def _open(path: Path, network: str) -> plyvel.DB:
    _check_log(path)
    try:
        database = plyvel.DB(str(path), create_if_missing=False, **_OPTIONS)
    except plyvel.CorruptionError:
        cut = cut_torn_tail(path)
        if cut is None:
            raise
        log.warning("torn tail of the log removed", log=str(cut.log), bytes=cut.size, kept=str(cut.kept))
        database = plyvel.DB(str(path), create_if_missing=False, **_OPTIONS)
    try:
        _check_meta(database, path, network)
    except BaseException:
        database.close()
        raise
    return database


def copy_of(path: Path, target: Path) -> None:
    """Copy the files of a store that no process uses.

    Raises:
        StoreFailed: the store is missing or in use.
    """
    if not path.is_dir():
        msg = f"there is no store in {path}"
        raise StoreFailed(msg)
    lock = _lock(path)
    try:
        shutil.copytree(path, target, ignore=_no_directories)
    finally:
        os.close(lock)


def check_unused(path: Path) -> None:
    """Check that no process has a store open in this directory, if there is one. Raises `StoreFailed`, `OSError`."""
    if (path / LOCK_NAME).exists():
        os.close(_lock(path))


def _no_directories(directory: str, names: list[str]) -> list[str]:
    """Leave out what a filesystem or a rebuild puts beside the files of a store in a mount point."""
    return [name for name in names if (Path(directory) / name).is_dir()]


def _lock(path: Path) -> int:
    """Lock the directory for one store of this process; the lock file holds the process id for error messages.

    LevelDB has a lock too, but of the kind (fcntl) that is lost as soon as this process opens and closes the file LOCK
    for any reason, including a second attempt to open the store.
    """
    lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        owner = os.pread(lock, 20, 0).decode(errors="replace")
        os.close(lock)
        msg = f"{path} is in use by {described(owner)}: stop it, or give each server its own directory"
        raise StoreFailed(msg) from None
    return lock


def _begin(path: Path, network: str, *, create: bool) -> None:
    """Create an empty store beside the path and move it into place: so a store without its meta entry is always damaged.

    LevelDB itself would create a new store wherever CURRENT is missing, and delete the tables it finds there.
    """
    if path.exists() and any(path.iterdir()):
        msg = f"{path} is not a store, or is damaged: it has no CURRENT; {WHAT_TO_DO}"
        raise StoreDamaged(msg)
    if not create:
        msg = f"there is no store in {path}; check the configured path, or start the server once"
        raise StoreFailed(msg)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as new:
        database = plyvel.DB(new, create_if_missing=True, error_if_exists=True, **_OPTIONS)
        database.put(META_KEY, f"{FORMAT} {network}".encode(), sync=True)
        database.close()
        sync_directory(Path(new))
        Path(new).rename(path)
    sync_directory(path.parent)


def _check_meta(database: plyvel.DB, path: Path, network: str) -> None:
    meta = database.get(META_KEY, verify_checksums=True)
    if meta is None:
        msg = f"{path} is not a store of channels, or lost its data; {WHAT_TO_DO}"
        raise StoreDamaged(msg)
    found_format, _, found_network = meta.decode("ascii", "replace").partition(" ")
    if found_format != str(FORMAT):
        msg = f"{path} has store format {found_format}, this program reads {FORMAT}; use the version that made it"
        raise StoreFailed(msg)
    if found_network != network:
        msg = f"{path} holds channels of the {found_network} network, not {network}; use another directory"
        raise StoreFailed(msg)


def _why_not_opened(path: Path, error: Exception) -> str:
    text = error_text(error)
    if isinstance(error, plyvel.CorruptionError):
        return f"{path} is damaged ({text}); {WHAT_TO_DO}"
    if is_held(text):
        return f"{path} is in use by another program: the command `fuser {quoted(path / 'LOCK')}` finds it; stop it"
    return f"{path} can't be opened: {text}"
