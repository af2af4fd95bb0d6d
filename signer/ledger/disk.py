"""Disk space: a reserve is kept for settlements. Below it, other requests are refused until there is space again.

Other programs use the same file system and can fill it. A settlement writes little: some hundred bytes of ledger and
audit log. Requests that only lead to more channels stop first. A file beside the ledger holds a quarter of the reserve.
Only a write that lacks space makes this file smaller; it is filled up when there is space again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from paychan.shared.mounts import beside
from paychan.shared.reservefile import ReserveFile

log = structlog.get_logger()

_LOOK_SECONDS = 1.0
_LEAST_FILES = 64
"""LevelDB creates new files at times; a file system may run out of inodes before it runs out of bytes."""
_KEY_BYTES, _LINE_BYTES = 40, 2_000
"""Upper limits, except for lines about many channels; `ReserveFile` allows for twice as much."""
_BUFFER_BYTES = 4 << 20
"""LevelDB's default write buffer."""


class Disk:
    """The file system of ledger and audit log."""

    def __init__(self, path: Path, reserve_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._reserve_bytes = reserve_bytes
        self._clock = clock
        self._seen: tuple[float, int, str] | None = None

    @property
    def free_bytes(self) -> int:
        """Free bytes for this process; at most a second old."""
        return self._look()[1]

    @property
    def shortage(self) -> str:
        """The reason why only settlements are answered, or ""; at most a second old."""
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
            return 0, f"{self._path} can't be measured: {error.strerror}"
        free = found.f_bavail * found.f_frsize
        if free < self._reserve_bytes:
            return free, f"{free} bytes are free at {self._path}, want disk.reserve_mb: {self._reserve_bytes} bytes"
        if found.f_files and found.f_favail < _LEAST_FILES:
            return free, f"{found.f_favail} more files can be created at {self._path}, want {_LEAST_FILES}"
        return free, ""


class LedgerReserve:
    """The reserve's file beside a ledger: a quarter of the reserve."""

    def __init__(self, ledger: Path, audit: Path, reserve_bytes: int) -> None:
        self._size, self._audit = reserve_bytes // 4, audit
        self._file = ReserveFile(beside(ledger, ".reserve"), ledger, self._size, _BUFFER_BYTES)
        self._file.on_given = self._given
        self._file.make_room(self._file.opening_bytes())

    @property
    def size(self) -> int:
        """Bytes of the file; before a write with less free space than this, `before_write` has work."""
        return self._size

    def before_write(self, values: Mapping[bytes, bytes], lines: int) -> None:
        """Make sure of the space for a write of these values to the ledger, and of lines to the audit log."""
        size = sum(len(value) + _KEY_BYTES for value in values.values()) + _LINE_BYTES * lines
        self._file.before_write(size, self._audit)

    def fill_up(self) -> None:
        """Enlarge the file again, while as much as its size stays free."""
        self._file.fill_up(self._size)

    def _given(self, left: int) -> None:
        log.error("disk is full, a write took space from the reserve", reserve_bytes=left)
