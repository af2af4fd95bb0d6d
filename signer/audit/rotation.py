"""Rotation of a running signer's audit log: a large file becomes an archive beside it, and a new one continues.

Both form one chain (`archive`). An archive is never changed or removed here: the operator may move it at any time.
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
    """An `AuditFile` that continues in a new one when it is large. The caller lets only one thread append."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Open the log, or create it; `most_bytes` 0: it stays one file. Raises as `AuditFile`."""
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
        """See `AuditFile.holds`. Only the last line of an archive is known here."""
        return self._file.holds(head)

    def close(self) -> None:
        """See `AuditFile.close`."""
        self._file.close()

    def _rotate(self) -> None:
        """Archive the file. If that fails before anything has changed, the log continues in the same file.

        Raises:
            AuditFailed: which file is the log is unknown.
        """
        try:
            put_aside(self._path, self._file.head, time.time_ns() // 1_000_000)
        except AuditFailed as error:
            self._file.check()
            self._rotated_above = self._file.size + self._most_bytes
            log.warning("the audit log continues in the same file", reason=str(error))
            return
        follower = AuditFile(self._path, create=False)
        self._file.close()
        self._file, self._rotated_above = follower, self._most_bytes
        log.info("the audit log continues in a new file", after=os.fspath(self._path))
