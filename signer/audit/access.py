"""A log's file: opened as its only writer, and read while a signer appends to it.

Only the signer writes it, under a lock on the file. A reader needs no lock: lines are only added.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from paychan.shared.leveldb_files import sync_directory
from signer.audit.chain import BEGINNING, AuditBroken, Entry, Head, beginning, read_line

_BLOCK_BYTES = 64 * 1024

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""O_NOFOLLOW: a link could point to a file of another user; O_NONBLOCK: a pipe must not hang the start."""


_PATIENCE, _PATIENCE_SECONDS = 5, 0.02
"""A line that is still torn after this many reads is not being written any more."""


class AuditFailed(Exception):
    """The log can't be opened or written; the text says how to mend it."""


# --- opening ---------------------------------------------------------------------------------------------------------


def open_at_end(path: Path, *, create: bool) -> tuple[int, Head, int]:
    """Open a log as its only writer; return its descriptor, its head, and how many bytes of a torn line were cut off.

    Raises:
        AuditFailed: in use, not a private file of this user, or not accessible.
        AuditBroken: its last line is damaged.
    """
    descriptor = open_locked(path, create=create)
    try:
        torn_bytes = _cut_torn_line(descriptor)
        head = _last_head(descriptor)
        sync_directory(path.parent)
    except OSError as error:
        os.close(descriptor)
        msg = f"{path} can't be used: {error.strerror}"
        raise AuditFailed(msg) from error
    except AuditBroken:
        os.close(descriptor)
        raise
    return descriptor, head, torn_bytes


def open_locked(path: Path, *, create: bool) -> int:
    """Open a log as its only writer, with any content.

    Raises:
        AuditFailed: in use, not a private file of this user, or not accessible.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, _FLAGS | (os.O_CREAT if create else 0), 0o600)
    except OSError as error:
        msg = f"{path} can't be opened: {error.strerror}"
        raise AuditFailed(msg) from error
    problem = _file_problem(os.fstat(descriptor)) or _lock_problem(descriptor) or _moved_problem(descriptor, path)
    if problem:
        os.close(descriptor)
        msg = f"{path} {problem}"
        raise AuditFailed(msg)
    return descriptor


def _file_problem(status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_uid != os.geteuid():
        return f"belongs to uid {status.st_uid}, this is uid {os.geteuid()}: only the signer's user writes it"
    if status.st_mode & 0o077:
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, others can use it: `chmod 600` it"
    return ""


def _lock_problem(descriptor: int) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "is in use by a running signer: stop it first"
    return ""


def _moved_problem(descriptor: int, path: Path) -> str:
    """A writer that gets the lock after the log was archived would append to the archive."""
    return "" if os.path.lexists(path) and path.stat().st_ino == os.fstat(descriptor).st_ino else "was moved: try again"


def _cut_torn_line(descriptor: int) -> int:
    """Remove the bytes after the last newline; return their number."""
    size = os.fstat(descriptor).st_size
    end = _line_start(descriptor, size)
    if end < size:
        os.ftruncate(descriptor, end)
        os.fdatasync(descriptor)
    return size - end


def _last_head(descriptor: int) -> Head:
    size = os.fstat(descriptor).st_size
    if not size:
        return BEGINNING
    last = _read_at(descriptor, _line_start(descriptor, size - 1))[0]
    return Head(last.n, last.hash)


# --- reading ---------------------------------------------------------------------------------------------------------


def holds(descriptor: int, head: Head) -> bool:
    """See `file.AuditFile.holds`; takes a few reads, whatever the file's length."""
    if head.count == 0:
        return head == BEGINNING
    start, end = seek(descriptor, head.count), _whole_size(descriptor)
    if start >= end:
        return False
    entry, _ = _read_at(descriptor, start)
    # An archived log's last line is known from the first line after it.
    return head in (Head(entry.n, entry.hash), beginning(entry))


def seek(descriptor: int, number: int) -> int:
    """Return the offset of the first line whose `n` is `number` or more; the end, if there is none.

    Raises:
        AuditBroken: a line that had to be read is damaged.
    """
    low, high = 0, _whole_size(descriptor)
    while low < high:
        start = _line_start(descriptor, (low + high) // 2)
        entry, size = _read_at(descriptor, start)
        if entry.n < number:
            low = start + size
        else:
            high = start
    return low


def lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Read a log's lines from an offset on, without lines that a running signer adds meanwhile. Raises OSError."""
    with path.open("rb") as file:
        left = _settled_size(file.fileno()) - start
        file.seek(start)
        while left > 0 and (line := file.readline(left)):
            left -= len(line)
            yield line


def newest_first(path: Path) -> Iterator[bytes]:
    """Read a log's lines from its end, and only as much of it as is consumed. Raises OSError."""
    with path.open("rb") as file:
        end, carried = _settled_size(file.fileno()), b""
        while end > 0:
            begin = max(0, end - _BLOCK_BYTES)
            block = os.pread(file.fileno(), end - begin, begin) + carried
            # The first line of the block began before it, except at the start of the file.
            cut = (block.find(b"\n") + 1 or len(block)) if begin else 0
            carried, end = block[:cut], begin
            yield from reversed(BytesIO(block[cut:]).readlines())


def _whole_size(descriptor: int) -> int:
    """Size without a line that is being written."""
    return _line_start(descriptor, os.fstat(descriptor).st_size)


def _settled_size(descriptor: int) -> int:
    """Size of the file, after a write in progress has ended."""
    for _ in range(_PATIENCE):
        size = os.fstat(descriptor).st_size
        if _line_start(descriptor, size) == size:
            return size
        time.sleep(_PATIENCE_SECONDS)
    return size


def _line_start(descriptor: int, position: int) -> int:
    """Return the offset of the line that contains the byte at `position`."""
    end = position
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _read_at(descriptor: int, start: int) -> tuple[Entry, int]:
    """Read the line at this offset, and its size with the newline."""
    line, found = b"", -1
    while found < 0 and (block := os.pread(descriptor, _BLOCK_BYTES, start + len(line))):
        found = block.find(b"\n")
        line += block[: found + 1] if found >= 0 else block
    try:
        return read_line(line), len(line)
    except AuditBroken as error:
        raise AuditBroken(0, f"the line at byte {start} is {error.reason}") from None
