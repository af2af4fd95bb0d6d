"""Disk space reserved for settling, in case something else fills the disk completely.

`store.reserve_mb` sets three limits of free space. Below the whole, no channel is opened; below half, no payment is
accepted. A quarter is held by a file beside the store, and only a write of the store that lacks space makes this file
smaller (`reservefile`). When there is space again, the file is filled up.

LevelDB needs more space than its log when the log is full: then it writes the log's content into a table. So the log is
begun anew while there is still space for that, and what the reserve holds goes into one log. A restart writes a table
as well; it gets its space from the reserve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from paychan.shared.mounts import inner_place
from paychan.shared.reservefile import ReserveFile
from paychan.supervisor import Supervised

log = structlog.get_logger("disk")

_LOOK_SECONDS = 1.0
_SPARE_BYTES = 256 << 10


class DiskReserve:
    """The reserve of a store at `store_path`; `size` is `store.reserve_mb` in bytes."""

    def __init__(self, store_path: Path, size: int, buffer_bytes: int) -> None:
        """`buffer_bytes` is the write buffer of the store's LevelDB."""
        self._size, self._part = size, size // 4
        place = inner_place(store_path)
        self.file = ReserveFile(place.with_name(f"{place.name}.reserve"), store_path, self._part, buffer_bytes)
        self.file.on_given = self._given
        self._problem = ""
        self._held = self.file.held
        """Bytes that the file held at the last look."""
        self.allows_payments = True
        self.allows_channels = True
        self.on_change: Callable[[], object] = lambda: None
        """Called after `allows_payments` or `allows_channels` changed, also in the thread that writes."""
        self.begin_log: Callable[[], Awaitable[None]] | None = None
        """Makes the store begin a new log if the present one is long."""

    def look(self) -> bool:
        """Fill up the reserve, and note whether channels and payments are allowed; return whether less is allowed than before.

        The reserve grows only while a quarter stays free: a table that LevelDB writes needs the rest.
        """
        self._fill_up(self._part)
        self._held = self.file.held
        free = self.file.free()
        before = self.allows_payments, self.allows_channels
        allows = free >= self._size // 2
        if allows != self.allows_payments:
            log.warning("payments resume" if allows else "payments stop: disk nearly full", free_bytes=free)
        self.allows_payments, self.allows_channels = allows, free >= self._size
        if (self.allows_payments, self.allows_channels) != before:
            self.on_change()
        return (allows, self.allows_channels) < before

    def opened(self) -> None:
        """Take back what opening the store was given and has not used; never more, or little would be left for others."""
        self._fill_up(_SPARE_BYTES, self._held)

    async def run(self, task: Supervised) -> None:
        """Check the disk once a second."""
        while True:
            if self.look() and self.begin_log and self.file.free() >= self.file.opening_bytes() + self._part:
                await self.begin_log()
            task.succeeded()
            await asyncio.sleep(_LOOK_SECONDS)

    def _fill_up(self, spare: int, most: int | None = None) -> None:
        problem = self.file.fill_up(spare, most)
        if problem and problem != self._problem:
            log.warning("the disk reserve can't be filled up", reason=problem)
        self._problem = problem

    def _given(self, left: int) -> None:
        self.allows_payments = self.allows_channels = False
        self.on_change()
        log.error("disk is full, a write took space from the reserve", reserve_bytes=left)
