"""Locking and durability of wallet files, for Windows and for POSIX."""

from __future__ import annotations

import os
import sys
from pathlib import Path

BINARY: int = getattr(os, "O_BINARY", 0)
"""Stops Windows from translating line ends in data that is written through a descriptor."""


if sys.platform == "win32":
    import msvcrt

    def lock(descriptor: int) -> None:
        """Lock an open file for this process. Raises `BlockingIOError` if another process holds the lock."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error

    def sync_directory(directory: Path) -> None:
        """Do nothing: Windows makes a file's name durable together with the file."""

else:
    import fcntl

    def lock(descriptor: int) -> None:
        """Lock an open file for this process. Raises `BlockingIOError` if another process holds the lock."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def sync_directory(directory: Path) -> None:
        """Make the directory's entries durable."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
