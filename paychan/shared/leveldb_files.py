"""Files of a LevelDB directory: cuts off an unfinished write after a power cut, reads error texts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from paychan.shared.leveldb_log import torn_tail


class TornTail(NamedTuple):
    """A partial record that was cut off a log: its size in bytes, and the file that keeps its bytes."""

    log: Path
    size: int
    kept: Path


def cut_torn_tail(path: Path) -> TornTail | None:
    """Cut a torn tail off the newest log in a LevelDB directory; its bytes are kept beside the directory.

    No record in the tail was acknowledged: an acknowledgement follows the sync of the whole record. Other damage of a
    log stays, and stops the start. Returns None if there was no torn tail. Raises OSError.
    """
    newest = max(path.glob("[0-9]*.log"), default=None)
    content = newest.read_bytes() if newest is not None else b""
    offset = torn_tail(content)
    if newest is None or offset is None:
        return None
    kept = path.with_name(f"{path.name}.torn-{newest.stem}-{offset}")
    kept.write_bytes(content[offset:])
    with newest.open("r+b") as log:
        log.truncate(offset)
        os.fsync(log.fileno())
    return TornTail(newest, len(content) - offset, kept)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; LevelDB does so for later files, but not for the directory itself."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_at(path: str | os.PathLike[str], descriptor: int) -> bool:
    """Return whether an open file or directory is still at its path: neither removed nor moved. Raises OSError."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))  # noqa: PTH116 - half the time of Path.stat
    except (FileNotFoundError, NotADirectoryError):
        return False


def error_text(error: Exception) -> str:
    """Return the message of an error; plyvel's messages are bytes."""
    first = error.args[0] if error.args else ""
    return first.decode(errors="replace") if isinstance(first, bytes) else str(error)


_HELD = (os.strerror(errno.EAGAIN), "already held by process")
"""LevelDB's errors for a lock that another process holds; a LOCK file that can't be opened gives other errors."""


def is_held(text: str) -> bool:
    """Return whether an error's text says that another process, or this one, has the directory open."""
    return "LOCK" in text and any(each in text for each in _HELD)
