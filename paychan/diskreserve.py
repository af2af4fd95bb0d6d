"""Disk space reserved for settling, in case something else fills the disk completely.

`store.reserve_mb` sets three limits of free space. Below the whole, no channel is opened; below half, no payment is
accepted. A quarter is held by a file beside the store. When less than a quarter is free, the file is deleted: closing
and settling continue, and a restarted server finds room to open its store.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog

from paychan.supervisor import Supervised

log = structlog.get_logger("disk")

_LOOK_SECONDS = 1.0


class DiskReserve:
    """The reserve of a store at `store_path`; `size` is `store.reserve_mb` in bytes."""

    def __init__(self, store_path: Path, size: int) -> None:
        self._size = size
        self._file = store_path.with_name(f"{store_path.name}.reserve")
        self.allows_payments = True
        self.allows_channels = True

    def free(self) -> int:
        """Return the free bytes; if the system can't tell, enough to allow all work: the store reports a full disk."""
        path = self._file.parent
        try:
            found = os.statvfs(path if path.exists() else path.parent)
        except OSError:
            return 2 * self._size
        return found.f_bavail * found.f_frsize

    def look(self) -> None:
        """Delete or recreate the reserve file, and note whether channels and payments are allowed."""
        free, part = self.free(), self._size // 4
        if free < part and self._file.exists():
            log.error("disk is full, its reserve is released for settling", free_bytes=free, reserve_bytes=part)
            self._file.unlink(missing_ok=True)
            free = self.free()
        elif free >= self._size + part and part and not self._file.exists():
            self._keep(part)
        allows = free >= self._size // 2
        if allows != self.allows_payments:
            log.warning("payments resume" if allows else "payments stop: disk nearly full", free_bytes=free)
        self.allows_payments, self.allows_channels = allows, free >= self._size

    async def run(self, task: Supervised) -> None:
        """Check the disk once a second."""
        while True:
            self.look()
            task.succeeded()
            await asyncio.sleep(_LOOK_SECONDS)

    def _keep(self, size: int) -> None:
        descriptor = -1
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            log.warning("no disk reserve can be created", file=str(self._file), reason=error.strerror)
            self._file.unlink(missing_ok=True)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
