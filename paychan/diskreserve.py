"""Room on the store's disk that settling has to itself, also when something else fills the disk to its last byte.

Of `store.reserve_mb`, below the whole no channels are opened, below the half no payments are taken, and a quarter is kept as
a file beside the store, which is given up when less than that is free: closing and settling go on, and a server that is
started again finds room to open its store.
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
    """The reserve of a store at `store_path`, of `size` bytes in all."""

    def __init__(self, store_path: Path, size: int) -> None:
        self._size = size
        self._file = store_path.with_name(f"{store_path.name}.reserve")
        self.allows_payments = True
        self.allows_channels = True

    def free(self) -> int:
        """Bytes that are free; as many as needed where that can't be told: the store itself will tell."""
        path = self._file.parent
        try:
            found = os.statvfs(path if path.exists() else path.parent)
        except OSError:
            return 2 * self._size
        return found.f_bavail * found.f_frsize

    def look(self) -> None:
        """Give the file up, or make it again; note what may go on."""
        free, part = self.free(), self._size // 4
        if free < part and self._file.exists():
            log.error("disk is full, its reserve is given up for settling", free_bytes=free, reserve_bytes=part)
            self._file.unlink(missing_ok=True)
            free = self.free()
        elif free >= self._size + part and part and not self._file.exists():
            self._keep(part)
        allows = free >= self._size // 2
        if allows != self.allows_payments:
            log.warning("payments go on" if allows else "payments stop: disk nearly full", free_bytes=free)
        self.allows_payments, self.allows_channels = allows, free >= self._size

    async def run(self, task: Supervised) -> None:
        """Look every second."""
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
            log.warning("no reserve can be kept on disk", file=str(self._file), reason=error.strerror)
            self._file.unlink(missing_ok=True)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
