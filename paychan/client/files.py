"""Locking, modes and durability of wallet files, for Windows and for POSIX."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from paychan.client.errors import LooseMode, UnreadableFile

BINARY: int = getattr(os, "O_BINARY", 0)
"""Stops Windows from translating line ends in data that is written through a descriptor."""

_OTHERS = 0 if sys.platform == "win32" else stat.S_IRWXG | stat.S_IRWXO
"""Permission bits of the group and of all others; Windows has none."""


def check_mode(path: Path, found: os.stat_result) -> None:
    """Refuse a file or directory that others than its owner may use.

    Raises:
        LooseMode: its mode gives the group or others a permission; the text has the command that takes it away.
    """
    mode = stat.S_IMODE(found.st_mode)
    if not mode & _OTHERS:
        return
    want = "700" if stat.S_ISDIR(found.st_mode) else "600"
    raise LooseMode(path=path, got=f"{mode:04o}", want=want)


def read_private(path: Path) -> bytes:
    """Read a file that only its owner may use.

    Raises:
        LooseMode: see `check_mode`.
        UnreadableFile: the system refuses to read it.
    """
    try:
        with path.open("rb") as file:
            check_mode(path, os.fstat(file.fileno()))
            return file.read()
    except OSError as error:
        raise UnreadableFile(path=path, reason=error.strerror or error) from None


def write_private(path: Path, content: bytes) -> None:
    """Replace a file as a whole, mode 0600. After this returns, the content survives a power loss."""
    temporary = path.with_name(f".{path.name.removesuffix('.json')}.new")
    temporary.unlink(missing_ok=True)  # of an interrupted write; its mode may be another
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)
    sync_directory(path.parent)


if sys.platform == "win32":
    import msvcrt

    def lock(descriptor: int, *, wait: bool = False) -> None:
        """Lock an open file for this process; `wait` for another process for up to 10 s.

        Raises `BlockingIOError` if another process holds the lock.
        """
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error

    def sync_directory(directory: Path) -> None:
        """Do nothing: Windows makes a file's name durable together with the file."""

else:
    import fcntl

    def lock(descriptor: int, *, wait: bool = False) -> None:
        """Lock an open file for this process; `wait` until no other process holds the lock.

        Raises `BlockingIOError` if another process holds the lock.
        """
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def sync_directory(directory: Path) -> None:
        """Make the directory's entries durable."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
