"""The audit log of a running signer: only appended to, and synced before the signer sends its reply.

A large file becomes an archive beside it, and a new one continues. Both form one chain (`archive`). An archive is never
changed or removed here: the operator may move it at any time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import structlog

from signer.audit.access import AuditFailed, holds, open_at_end
from signer.audit.archive import put_aside
from signer.audit.chain import Decision, Head, encode_lines

log = structlog.get_logger()


class AuditFile:
    """The log of a running signer. The caller makes sure that only one thread at a time appends."""

    def __init__(self, path: Path, most_bytes: int = 0) -> None:
        """Open the log, or create it. An unfinished line, left by a crash before any reply, is cut off.

        `most_bytes`: size at which the log continues in a new file; 0: never.

        Raises:
            AuditFailed: in use, not a private file of this user, or not accessible.
            AuditBroken: its last line is damaged.
        """
        self._path = path
        self._most_bytes = self._rotated_above = most_bytes
        self._failure = ""
        self._descriptor, self._head, torn_bytes = open_at_end(path, create=True)
        self.torn_bytes = torn_bytes
        """Number of bytes that were cut off, for the signer's log."""

    @property
    def head(self) -> Head:
        """State of the log on disk."""
        return self._head

    def check(self) -> None:
        """Check that the next start finds the file at its path, and that it can be written.

        Raises:
            AuditFailed: it was removed, moved or replaced, or its file system is read-only now.
        """
        if self._failure:
            raise AuditFailed(self._failure)
        try:
            here, there = os.fstat(self._descriptor), self._path.lstat()
            flags = os.fstatvfs(self._descriptor).f_flag
        except OSError as error:
            self._fail(error.strerror, error)
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            self._fail("it was moved or replaced")
        if flags & os.ST_RDONLY:
            self._fail("its file system is read-only now")

    def append(self, decisions: Sequence[Decision]) -> Head:
        """Log these decisions with one write and one sync; return the new head. They are on disk when this returns.

        The lines of one call are in one file.

        Raises:
            AuditFailed: the state of the disk is unknown. Later calls fail too, until the signer is started again.
        """
        if self._failure:
            raise AuditFailed(self._failure)
        if not decisions:
            return self._head
        if self._most_bytes and os.fstat(self._descriptor).st_size >= self._rotated_above:
            self._rotate()
        lines, head = encode_lines(decisions, self._head)
        try:
            written = os.write(self._descriptor, lines)
            if written < len(lines):
                self._fail(f"{written} of {len(lines)} bytes were written")
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._fail(error.strerror, error)
        self._head = head
        return head

    def holds(self, head: Head) -> bool:
        """Say whether the log once ended at `head`; False: lines were removed from its end, or it is another log.

        Only the last line of an archive is known here.

        Raises:
            AuditBroken: a line that had to be read is damaged.
            OSError: it can't be read.
        """
        return holds(self._descriptor, head)

    def close(self) -> None:
        """Close the file; later calls fail."""
        if self._failure != "closed":
            self._failure = "closed"
            os.close(self._descriptor)

    def _rotate(self) -> None:
        """Archive the file. If that fails before anything has changed, the log continues in the same file.

        Raises:
            AuditFailed: which file is the log is unknown.
        """
        try:
            put_aside(self._path, self._head, time.time_ns() // 1_000_000)
        except AuditFailed as error:
            self.check()
            self._rotated_above = os.fstat(self._descriptor).st_size + self._most_bytes
            log.warning("the audit log continues in the same file", reason=str(error))
            return
        archived = self._descriptor
        self._descriptor, self._head, _ = open_at_end(self._path, create=False)
        os.close(archived)
        self._rotated_above = self._most_bytes
        log.info("the audit log continues in a new file", after=os.fspath(self._path))

    def _fail(self, reason: str | None, error: OSError | None = None) -> NoReturn:
        self._failure = f"a write to {self._path} failed ({reason}): check the disk, then start the signer again"
        raise AuditFailed(self._failure) from error
