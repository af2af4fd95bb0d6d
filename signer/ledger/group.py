"""Entries of the ledger that one write stores together."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import suppress

from signer import vital
from signer.audit.chain import Decision
from signer.ledger.base import LedgerFailed


class Group:
    """Values that are written together. Awaiting it waits until they are on disk, and raises `LedgerFailed`.

    Each waiter has its own future: one that is cancelled disturbs no other. The loop is woken once for all of them.
    """

    __slots__ = ("_failure", "_loop", "_waiters", "decisions", "is_awaited", "values")

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.decisions: list[Decision] = []
        self.is_awaited = False
        """A caller waits until it is on disk; otherwise it need not be synced."""
        self._failure: str | None = None
        """None: it is not written yet; "": it is on disk."""
        self._waiters: list[asyncio.Future[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_empty(self) -> bool:
        return not self.values and not self.decisions and not self.is_awaited

    def join(self) -> None:
        """Note the running event loop, which `written` wakes, and that a caller may wait for the disk."""
        self.is_awaited, self._loop = True, asyncio.get_running_loop()

    def written(self, failure: str) -> None:
        """Wake the waiters; "" is success. Called by the thread that writes."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and nothing waits
                self._loop.call_soon_threadsafe(vital.guarded("written", self._wake), failure)

    def _wake(self, failure: str) -> None:
        self._failure = failure
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def __await__(self) -> Generator[asyncio.Future[None], None, None]:
        if self._failure is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            yield from waiter
        if self._failure:
            raise LedgerFailed(self._failure)
