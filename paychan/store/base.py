"""The store's contract. One test suite, `tests/contract/test_store.py`, checks it for every backend.

*Durable*: when `commit` returns, its records survive power loss; there is no other way to write. *Conditional*: a
record is written only over the version that the writer has read, so writers (processes, machines) can't undo each
other's work. *Ordered*: readers see awaited commits in the order in which they were awaited, also after a crash.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from msgspec import Struct, field

from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.expiry import MAX_EXPIRY
from paychan.protocol.types import OutPoint


class Change(Struct, frozen=True):
    """One record to write: the version that the writer has read (None: the outpoint is unused), and the next version."""

    previous: Channel | None
    channel: Channel


class Message(Struct, frozen=True):
    """A message to the application about a channel, as it waits in the store."""

    key: bytes
    outpoint: OutPoint
    body: bytes


class StoreFailed(Exception):
    """The disk or the database failed: the stored state is unknown. The process must stop; the store is the truth."""


class StoreDamaged(StoreFailed):
    """The content of the disk is not the written content. The next start rebuilds the store from all that can be read."""


class Damage(Struct, frozen=True):
    """Parts that a store could not read since it was opened."""

    records: Mapping[OutPoint, str] = field(default_factory=dict)
    """Channels whose record is damaged, with the reasons."""
    block: str = ""
    """Why a part of unknown content can't be read; "": no such part was met."""

    @property
    def text(self) -> str:
        """The damage in words; "": none was met."""
        parts = []
        if self.records:
            outpoint, reason = next(iter(self.records.items()))
            parts.append(f"damaged records: {len(self.records):,}, the first is {outpoint} ({reason})")
        if self.block:
            parts.append(f"a part of the store can't be read ({self.block})")
        return "; ".join(parts)


class Store(Protocol):
    """Channels by outpoint. Methods are called on the event loop and must not block it."""

    async def get(self, outpoint: OutPoint) -> Channel | None:
        """Read the newest committed version.

        Raises:
            DamagedRecord: the stored record can't be trusted.
            StoreFailed: the record could not be read.
        """

    async def commit(self, changes: Sequence[Change]) -> Sequence[bool]:
        """Write many records with one synced write; return for each whether it was written.

        False: the stored version is not `previous` (another writer was first, or the outpoint is used). That record is
        left out, the others are written. A later change of a batch is checked against the earlier ones of the same
        batch.

        Raises:
            StoreFailed: each change may or may not have been written.
        """

    async def scan(
        self,
        state: State,
        *,
        before: int = MAX_EXPIRY + 1,
        after: tuple[int, OutPoint] | None = None,
        limit: int = 1000,
    ) -> Sequence[Channel]:
        """List channels of a state whose expiry is earlier than `before`, ordered by (expiry, outpoint bytes).

        A page begins behind `after`. The store reads only the channels that it returns, whatever its size. What can't
        be read is left out and counted in `damage`: all other channels must still settle.

        Raises:
            StoreFailed: the store could not be read.
        """

    def snapshot(self) -> AbstractContextManager[Iterator[bytes]]:
        """Iterate over all records as stored at one moment, while writing continues.

        Called and used in a worker thread.

        Raises:
            StoreFailed: also while iterating, if a part of the store can't be read.
        """

    async def messages(self, after: bytes = b"", limit: int = 100) -> Sequence[Message]:
        """List messages to the application that wait, by channel and then in the order of its changes.

        A message is written in one write with the change that it tells. A page begins behind the key `after`.

        Raises:
            StoreFailed: the store could not be read.
        """

    async def delivered(self, key: bytes) -> None:
        """Remove a message. After a power cut it may be there again.

        Raises:
            StoreFailed: the store could not be written.
        """

    @property
    def damage(self) -> Damage:
        """The parts that could not be read so far."""

    async def close(self) -> None:
        """Finish running work; release files and locks."""


async def walk(store: Store, state: State, before: int = MAX_EXPIRY + 1) -> AsyncIterator[Channel]:
    """Yield all channels of a state that expire earlier than `before`, page by page, earliest first."""
    after = None
    while page := await store.scan(state, before=before, after=after):
        for channel in page:
            yield channel
        after = (page[-1].terms.expiry.lock_time, page[-1].outpoint)


async def get_readable(store: Store, outpoint: OutPoint) -> Channel | None:
    """Read a channel for work on many: None also if its record is damaged, which must not stop the work on others."""
    try:
        return await store.get(outpoint)
    except DamagedRecord:
        return None
