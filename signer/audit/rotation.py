"""The audit log of a running signer goes on in a new file when it is large: the old one becomes an archive beside it.

Both are one chain (`auditarchive`). An archive is never changed or removed here: it may be moved elsewhere at any time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from signer.audit.archive import put_aside
from signer.audit.chain import Decision, Head
from signer.audit.file import AuditFailed, AuditFile

log = structlog.get_logger()


class RotatingAudit:
    """An `AuditFile` that is followed by another one. Its caller sees to it that one thread at a time appends."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Open the log, or begin it; `most_bytes` 0: it stays one file. Raises as `AuditFile`."""
        self._path = path
        self._most_bytes = self._rotated_above = most_bytes
        self._file = AuditFile(path)

    @property
    def torn_bytes(self) -> int:
        """See `AuditFile`."""
        return self._file.torn_bytes

    @property
    def head(self) -> Head:
        """See `AuditFile`."""
        return self._file.head

    def append(self, decisions: Sequence[Decision]) -> Head:
        """See `AuditFile.append`; the lines of one call are in one file."""
        if self._most_bytes and self._file.size >= self._rotated_above:
            self._rotate()
        return self._file.append(decisions)

    def check(self) -> None:
        """See `AuditFile.check`."""
        self._file.check()

    def holds(self, head: Head) -> bool:
        """See `AuditFile.holds`. Of an archive only its last line is known here."""
        return self._file.holds(head)

    def close(self) -> None:
        """See `AuditFile.close`."""
        self._file.close()

    def _rotate(self) -> None:
        """Put the file aside. Where that fails before anything has changed, the log goes on in the same file.

        Raises:
            AuditFailed: which file is the log is unknown.
        """
        try:
            put_aside(self._path, self._file.head, time.time_ns() // 1_000_000)
        except AuditFailed as error:
            self._file.check()
            self._rotated_above = self._file.size + self._most_bytes
            log.warning("the audit log goes on in the same file", reason=str(error))
            return
        follower = AuditFile(self._path, create=False)
        self._file.close()
        self._file, self._rotated_above = follower, self._most_bytes
        log.info("the audit log goes on in a new file", after=os.fspath(self._path))
