"""A file that reserves disk space for a LevelDB directory, and hands it to LevelDB in small slices when the disk is full.

The file gives space only right before a write that lacks it. Space that is merely free can be taken by another program
between two system calls. So the space for LevelDB's log is allocated behind the end of the log, where no other program
can take it (fallocate(2), FALLOC_FL_KEEP_SIZE). A table or a new log can't be allocated ahead, because LevelDB
truncates a file when it creates it: the space for these is freed just before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_SLICE_BYTES = 256 << 10
_AHEAD_BYTES = 64 << 10
"""Allocated behind the end of a file, in addition to twice the write: log headers, records of metadata."""
_TABLE_BYTES = 1 << 20
"""Needed beside the content of a log when LevelDB writes it into a table: index, filter, manifest, a new log."""
_FULL_PART = 0.75
"""If a log has this part of LevelDB's write buffer, LevelDB may write a table next: the log's entries take more memory
than bytes in the log."""
_KEEP_SIZE = 1
"""Linux fallocate(2), FALLOC_FL_KEEP_SIZE."""
_FULL = (errno.ENOSPC, errno.EDQUOT)

_libc = ctypes.CDLL(None, use_errno=True)


class ReserveFile:
    """The file of a LevelDB directory, of at most `size` bytes; safe for use from several threads."""

    def __init__(self, file: Path, directory: Path, size: int, buffer_bytes: int) -> None:
        """`buffer_bytes` is LevelDB's write buffer, which limits its log."""
        self._file, self._directory = file, directory
        self._size, self._buffer_bytes = size, buffer_bytes
        self._lock = threading.Lock()
        self.on_given: Callable[[int], None] = lambda _: None
        """Called with the bytes that are left, after the file became smaller; in the thread that writes."""

    def free(self) -> int:
        """Return the free bytes; if the system can't tell, enough for all work: a write then reports a full disk."""
        try:
            found = os.statvfs(self._file.parent)
        except OSError:
            return 1 << 62
        return found.f_bavail * found.f_frsize

    @property
    def size(self) -> int:
        """Bytes of the whole file; before a write with less free space than this, `before_write` has work."""
        return self._size

    @property
    def held(self) -> int:
        """Bytes that the file holds now."""
        return _size(self._file)

    def fill_up(self, spare: int, most: int | None = None) -> str:
        """Enlarge the file to its size, or to `most` bytes, or as far as `spare` bytes stay free.

        Return the reason of a failure, or an empty text.
        """
        with self._lock:
            held = self.held
            wanted = min(self._size if most is None else most, held + self.free() - spare)
            if wanted <= held or not self._file.parent.exists():
                return ""
            try:
                descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                return str(error.strerror)
            try:
                os.posix_fallocate(descriptor, held, wanted - held)
            except OSError as error:
                os.ftruncate(descriptor, held)
                return str(error.strerror)
            finally:
                os.close(descriptor)
            return ""

    def make_room(self, need: int) -> bool:
        """Give slices until `need` bytes are free.

        If all slices together do not suffice, give none and return False.
        """
        with self._lock:
            while (lacks := need - self.free()) > 0:
                if lacks > self.held:
                    return False
                self._give(lacks)
        return True

    def before_write(self, written: int, beside: Path | None = None) -> None:
        """Make room for a write of this many bytes to LevelDB's log and, if given, to a file beside it.

        Does nothing while more is free than the file's size. Never fails: the write itself reports a full disk.
        """
        if not self._size or self.free() >= self._size:
            return
        log = self.newest_log()
        if log is not None and _size(log) + written > self._buffer_bytes * _FULL_PART:
            self.make_room(_size(log) + written + _TABLE_BYTES)
        for file in (log, beside):
            if file is not None:
                with suppress(OSError):
                    self._allocate_ahead(file, 2 * written + _AHEAD_BYTES)

    def opening_bytes(self) -> int:
        """Bytes that opening the directory needs: LevelDB writes the content of its logs into tables."""
        return _TABLE_BYTES + sum(_size(log) for log in self._directory.glob("*.log"))

    def newest_log(self) -> Path | None:
        """Return the log that LevelDB writes now."""
        return max(self._directory.glob("*.log"), default=None, key=lambda log: (len(log.name), log.name))

    def _allocate_ahead(self, file: Path, size: int) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if status.st_blocks * 512 - status.st_size >= size:
                return
            most = max(size, _SLICE_BYTES)
            with self._lock:
                while (failure := _allocate(descriptor, status.st_size, (most, (most + size) // 2, size))) in _FULL:
                    if not self._give(size):
                        break
        finally:
            os.close(descriptor)
        if failure and failure not in _FULL:  # this file system can't allocate ahead
            self.make_room(size)

    def _give(self, lacks: int) -> bool:
        """Make the file smaller; return whether it held any bytes. The caller holds the lock."""
        held = self.held
        if not held:
            return False
        left = max(0, held - -(-lacks // _SLICE_BYTES) * _SLICE_BYTES)
        os.truncate(self._file, left)
        self.on_given(left)
        return True


def _allocate(descriptor: int, begin: int, sizes: Sequence[int]) -> int:
    """Allocate the first of these sizes for which there is space; the file's own size stays.

    Return the error number or 0.
    As much as possible of a slice goes here, because another program may take the rest.
    """
    failure = 0
    for size in sizes:
        if not _libc.fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(begin), ctypes.c_int64(size)):
            return 0
        failure = ctypes.get_errno()
    return failure


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
