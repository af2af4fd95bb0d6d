"""What differs between systems in how a wallet's files are locked and made durable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

BINARY: int = getattr(os, "O_BINARY", 0)
"""Windows translates line ends of what is written through a descriptor, unless told not to."""


if sys.platform == "win32":
    import msvcrt

    def lock(descriptor: int) -> None:
        """Lock an open file for this process. Raises `BlockingIOError` when another one holds it."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error

    def sync_directory(directory: Path) -> None:
        """Windows makes names durable together with the files."""

else:
    import fcntl

    def lock(descriptor: int) -> None:
        """Lock an open file for this process. Raises `BlockingIOError` when another one holds it."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def sync_directory(directory: Path) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
