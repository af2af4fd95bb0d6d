"""Room on the disk: a reserve is kept for settlements. Below it, what does not settle is refused until there is room again.

Other programs write to the same file system, so that it can fill up without us. What a settlement writes is small: some
hundred bytes of ledger and audit log. What only leads to more channels stops first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS = 1.0
_LEAST_FILES = 64
"""LevelDB begins new files now and then; a file system may run out of inodes before it runs out of bytes."""


class Disk:
    """The file system of ledger and audit log. Called from several threads."""

    def __init__(self, path: Path, reserve_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._reserve_bytes = reserve_bytes
        self._clock = clock
        self._seen: tuple[float, int, str] | None = None

    @property
    def free_bytes(self) -> int:
        """What is left for us; at most a second old."""
        return self._look()[1]

    @property
    def shortage(self) -> str:
        """Why only settlements go on, or ""; at most a second old."""
        return self._look()[2]

    def _look(self) -> tuple[float, int, str]:
        now, seen = self._clock(), self._seen
        if seen is None or not 0 <= now - seen[0] < _LOOK_SECONDS:
            self._seen = seen = (now, *self._measure())
        return seen

    def _measure(self) -> tuple[int, str]:
        try:
            found = os.statvfs(self._path)
        except OSError as error:
            return 0, f"{self._path} can't be looked at: {error.strerror}"
        free = found.f_bavail * found.f_frsize
        if free < self._reserve_bytes:
            return free, f"{free} bytes are free at {self._path}, want disk.reserve_mb: {self._reserve_bytes} bytes"
        if found.f_files and found.f_favail < _LEAST_FILES:
            return free, f"{found.f_favail} files can be made at {self._path}, want {_LEAST_FILES}"
        return free, ""
