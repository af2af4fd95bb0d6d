"""The store's contract. One suite, `tests/contract/test_store.py`, holds every backend to it.

*Durable*: when `commit` returns, its records survive power loss; there is no other way to write. *Conditional*: a
record is written only over the very version the writer has seen, so several writers (processes, machines) can't undo
each other's work. *Ordered*: commits that were awaited one after the other are seen in that order, also after a crash.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from msgspec import Struct

from paychan.protocol.channel import Channel, State
from paychan.protocol.kinds.script import MAX_EXPIRY
from paychan.protocol.types import OutPoint, UnixTime


class Change(Struct, frozen=True):
    """One record to write: the version the writer has seen (None: the outpoint was never used), and the next one."""

    previous: Channel | None
    channel: Channel


class StoreFailed(Exception):
    """The disk or the database failed: what was written is unknown. The process must stop; the store is the truth."""


class Store(Protocol):
    """Channels by outpoint. Methods are called on the event loop and must not block it."""

    async def get(self, outpoint: OutPoint) -> Channel | None:
        """Read the newest committed version.

        Raises:
            DamagedRecord: what is stored can't be trusted.
            StoreFailed: it could not be read.
        """

    async def commit(self, changes: Sequence[Change]) -> Sequence[bool]:
        """Write many records with one synced write, and say for each whether it was written.

        False: the stored version is not `previous` (somebody was first, or the outpoint is used); that record is left
        out, the others are written. A later change of a batch sees the earlier ones of the same batch.

        Raises:
            StoreFailed: nothing may be taken as written, nothing as not written.
        """

    async def scan(
        self,
        state: State,
        *,
        before: int = MAX_EXPIRY + 1,
        after: tuple[UnixTime, OutPoint] | None = None,
        limit: int = 1000,
    ) -> Sequence[Channel]:
        """List channels of a state whose expiry is earlier than `before`, ordered by (expiry, outpoint bytes).

        Pages begin behind `after`. Reads only the channels it returns, however many the store holds. A record that can't
        be trusted is left out, with an error in the log: the others must be settled all the same.

        Raises:
            StoreFailed: it could not be read.
        """

    def snapshot(self) -> AbstractContextManager[Iterator[bytes]]:
        """All records as stored, at one moment, while writing goes on. Called and iterated in a worker thread."""

    async def close(self) -> None:
        """Finish running work and let go of files and locks."""


async def walk(store: Store, state: State, before: int = MAX_EXPIRY + 1) -> AsyncIterator[Channel]:
    """Yield all channels of a state that expire earlier than `before`, page by page, earliest first."""
    after = None
    while page := await store.scan(state, before=before, after=after):
        for channel in page:
            yield channel
        after = (page[-1].terms.expiry, page[-1].outpoint)
