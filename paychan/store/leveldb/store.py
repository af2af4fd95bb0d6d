"""The default store: one LevelDB directory, used by one process.

Keys: `c` outpoint → record; `i` state expiry outpoint → empty, the index that `scan` walks; `z` → format and network. A
channel has one index entry, moved in the batch that writes its record. `z` sorts behind all others on purpose: plyvel
ends a walk without an error when the last blocks are damaged, so a walk that met no key behind its range was truncated.

Damage: a record or a block that can't be read is counted in `damage` and left out, and all others are found: where the
index is damaged, from the records. LevelDB itself writes no more as soon as it has to compact a damaged block. So the
first damage also leaves a note in the directory, and the next start of the server rebuilds the store (`backup/rebuild.py`).

Threads: one thread writes, so commits are in order and the loop never waits for the disk. Two threads read, so a long
scan delays neither a commit nor the reading of one channel. If all channels of a commit are in memory, the loop
prepares the batch and the thread only writes it: each switch between Python threads costs as much as preparing several
records.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import plyvel
import structlog
from msgspec.structs import replace

from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.expiry import MAX_EXPIRY
from paychan.protocol.record import decode_record, encode_record
from paychan.protocol.types import OutPoint
from paychan.shared.leveldb_files import error_text
from paychan.store.base import Change, Damage, StoreDamaged, StoreFailed
from paychan.store.leveldb.directory import (
    WHAT_TO_DO,
    WRITE_BUFFER_BYTES,
    note_damage,
    noted_damage,
    open_directory,
)
from paychan.store.leveldb.entries import UNREADABLE, MissingKeys, entries
from paychan.store.leveldb.writer import WriterThread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger("store")

RECORD, INDEX = b"c", b"i"
_RECORDS_END = bytes([RECORD[0] + 1])

STATE_CODES = {State.OPEN: 1, State.CLOSING: 2, State.PUBLISHED: 3, State.CLOSED: 4, State.LOST: 5, State.UNFUNDED: 6}
"""Second byte of an index key. It is stored: never renumber."""

OUTPOINT_BYTES = 36
_REMEMBERED = 20_000
"""Channels whose newest version is kept in memory, a few kB each: a payment must follow the last written version."""

_READERS = 2

_BEHIND_ALL_KEYS = {"start": b"\xfe", "stop": b"\xff"}
"""LevelDB compacts no table of this range, but first writes its log into a table."""

_CLOSED = "the store is closed"


class LevelDbStore:
    """`paychan.store.base.Store` on LevelDB. Create it with `open`."""

    def __init__(self, path: Path, database: plyvel.DB, lock: int) -> None:
        self._path, self._database = path, database
        self._lock = lock
        self._writer = WriterThread("store-writer")
        self._newest: OrderedDict[OutPoint, Channel] = OrderedDict()
        self._readers = ThreadPoolExecutor(_READERS, "store-reader")
        together = threading.Barrier(_READERS)  # starts all threads now, while there is memory for them
        wait([self._readers.submit(together.wait) for _ in range(_READERS)])
        self.before_write: Callable[[int], None] = lambda _: None
        """Called in the writer's thread with the bytes of the next write; makes room for it on a full disk."""
        self._failure: Exception | None = None
        self._damage = Damage(block=noted_damage(path))
        self._missing = MissingKeys()
        self._closing = False
        self._snapshots = 0
        self._snapshot_ended = threading.Condition()

    @classmethod
    def open(cls, path: Path, network: str, *, create: bool = True) -> LevelDbStore:
        """Open the directory, or create a store in it if there is none and `create` is true. Blocks; used at start.

        Raises:
            StoreFailed: in use, of another network or format, damaged, missing, or not accessible.
        """
        return cls(path, *open_directory(path, network, create=create))

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, outpoint: OutPoint) -> Channel | None:
        """See `Store`. Runs in a thread, because a record that is not in memory costs a disk read."""
        return await self._run(self._readers, self._get, outpoint.serialize())

    def _get(self, outpoint: bytes) -> Channel | None:
        try:
            raw = self._database.get(RECORD + outpoint, verify_checksums=True)
        except UNREADABLE as error:  # no record of this outpoint may exist: any outpoint can fall into the block
            self._block_damaged(error_text(error))
            raise DamagedRecord(reason=error_text(error)) from error
        return None if raw is None else self._decoded(outpoint, raw)

    def _decoded(self, outpoint: bytes, raw: bytes) -> Channel:
        try:
            return decode_record(raw)
        except DamagedRecord as error:
            self._record_damaged(outpoint, str(error.fields["reason"]))
            raise

    async def scan(
        self,
        state: State,
        *,
        before: int = MAX_EXPIRY + 1,
        after: tuple[int, OutPoint] | None = None,
        limit: int = 1000,
    ) -> Sequence[Channel]:
        """See `Store`."""
        begin = _index_begin(state, 0)
        if after is not None:
            begin = _index_key(state, after[0], after[1].serialize()) + b"\x00"  # the next possible key
        return await self._run(self._readers, self._scan, begin, _index_begin(state, before), limit)

    def _scan(self, begin: bytes, end: bytes, limit: int) -> list[Channel]:
        page, is_whole = self._page(begin, end, limit)
        if is_whole or not self._missing.is_outdated:
            return page
        self._search_missing_keys()
        return self._page(begin, end, limit)[0]

    def _page(self, begin: bytes, end: bytes, limit: int) -> tuple[list[Channel], bool]:
        """Read a page; the second value says whether the index could be read."""
        page, reasons = list[Channel](), list[str]()
        # All are closed here explicitly: plyvel crashes on snapshots and iterators that are open after their database
        # was closed, and the traceback of an exception can keep them alive until then.
        with (
            self._database.snapshot() as snapshot,
            closing(entries(snapshot, begin, end, reasons.append)) as index,
        ):
            for key in self._missing.merged((key for key, _ in index), begin, end):
                if len(page) == limit:
                    break
                channel = self._indexed(snapshot, key)
                if channel is not None:
                    page.append(channel)
        for reason in reasons:
            self._block_damaged(reason)
        return page, not reasons

    def _indexed(self, snapshot: plyvel.Snapshot, key: bytes) -> Channel | None:
        """Read the record of an index key; None if it can't be trusted, or its channel is in another state now.

        Damage may hide that a key was deleted, so the record decides.
        """
        outpoint = key[-OUTPOINT_BYTES:]
        try:
            channel = self._decoded(outpoint, snapshot.get(RECORD + outpoint, b"", verify_checksums=True))
        except DamagedRecord:
            return None
        except UNREADABLE as error:
            self._record_damaged(outpoint, error_text(error))
            return None
        return channel if _index_key(channel.state, channel.terms.expiry.lock_time, outpoint) == key else None

    def _search_missing_keys(self) -> None:
        """Find, from all readable records, the index keys that damage has taken out of the index."""
        with self._database.snapshot() as moment:

            def is_readable(key: bytes) -> bool:
                try:
                    return moment.get(key, verify_checksums=True) is not None
                except UNREADABLE:
                    return False

            def keys() -> Iterator[bytes]:
                for key, raw in records:
                    with suppress(DamagedRecord):
                        channel = self._decoded(key[1:], raw)
                        yield _index_key(channel.state, channel.terms.expiry.lock_time, key[1:])

            with closing(entries(moment, RECORD, _RECORDS_END, self._block_damaged, fill_cache=False)) as records:
                self._missing.search(keys(), is_readable)

    # --- damage -----------------------------------------------------------------------------------------------------

    @property
    def damage(self) -> Damage:
        """See `Store`."""
        return self._damage

    def _record_damaged(self, outpoint: bytes, reason: str) -> None:
        channel = OutPoint(outpoint[:32], int.from_bytes(outpoint[32:], "little"))
        if channel not in self._damage.records:
            self._damage = replace(self._damage, records={**self._damage.records, channel: reason})
            log.error("damaged record", channel=str(channel), reason=reason)
            self._note_damage(reason)

    def _block_damaged(self, reason: str) -> None:
        if not self._damage.block:
            self._damage = replace(self._damage, block=reason)
            log.error("damaged block", path=str(self._path), reason=reason)
            self._note_damage(reason)

    def _note_damage(self, reason: str) -> None:
        try:
            note_damage(self._path, reason)
        except OSError as error:
            log.error("the damage can't be noted for the next start", reason=error.strerror)  # noqa: TRY400

    @contextmanager
    def snapshot(self) -> Iterator[Iterator[bytes]]:
        """See `Store`.

        `close` ends a running iteration with `StoreFailed` and waits for the end of the `with` block.
        """
        with self._snapshot_ended:
            if self._closing:
                raise StoreFailed(_CLOSED)
            self._snapshots += 1
        try:
            with self._database.snapshot() as moment, closing(self._records(moment)) as records:
                yield records
        finally:
            with self._snapshot_ended:
                self._snapshots -= 1
                self._snapshot_ended.notify_all()

    def _records(self, moment: plyvel.Snapshot) -> Generator[bytes, None, None]:
        with closing(entries(moment, RECORD, _RECORDS_END, self._unreadable, fill_cache=False)) as found:
            for _, raw in found:
                if self._closing:
                    raise StoreFailed(_CLOSED)
                yield raw

    def _unreadable(self, reason: str) -> None:
        self._block_damaged(reason)
        msg = f"{self._path} is damaged ({reason}); {WHAT_TO_DO}"
        raise StoreFailed(msg)

    # --- writing ----------------------------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> Sequence[bool]:
        """See `Store`. After a failure all later calls fail, too: the content of LevelDB's log is unknown."""
        try:
            if self._writer.unfinished or not all(change.channel.outpoint in self._newest for change in changes):
                return await self._writer.run(self._commit, changes)
            batch, written = self._prepare(changes)
            if batch is not None:
                await self._writer.run(self._write, batch)
        except RuntimeError as error:  # the writer is shut down
            raise StoreFailed(_CLOSED) from error
        else:
            return written

    def _commit(self, changes: Sequence[Change]) -> Sequence[bool]:
        """Prepare and write in the writer's thread: a record must be read first, or earlier commits are pending."""
        batch, written = self._prepare(changes)
        if batch is not None:
            self._write(batch)
        return written

    def _check(self) -> None:
        if self._failure is not None:
            msg = f"an earlier write failed: {error_text(self._failure)}"
            raise StoreFailed(msg)

    def _prepare(self, changes: Sequence[Change]) -> tuple[plyvel.WriteBatch | None, Sequence[bool]]:
        """Make one batch of the changes that follow the stored versions; return for each change whether it does.

        From here on, later changes must follow the batch: if it is not written, no later batch is written either.
        """
        self._check()
        newest: dict[OutPoint, Change] = {}
        try:
            written = [self._admit(change, newest) for change in changes]
            batch = self._database.write_batch(sync=True) if newest else None
            for outpoint, change in newest.items():  # readers never see the versions in between
                self._enter(batch, outpoint, change.previous, change.channel)
        except Exception as error:
            raise self._failed(error) from error
        return batch, written

    def _admit(self, change: Change, newest: dict[OutPoint, Change]) -> bool:
        """Add a change to the batch if it follows the stored version or the one already in the batch."""
        outpoint = change.channel.outpoint
        earlier = newest.get(outpoint)
        try:
            stored = self._stored(outpoint) if earlier is None else earlier.channel
        except DamagedRecord:
            return False  # not the version that the writer has read; the damaged record stays as evidence
        if (
            stored is not change.previous and stored != change.previous
        ):  # the number alone does not suffice: another writer may have reached the same one
            return False
        newest[outpoint] = change if earlier is None else Change(earlier.previous, change.channel)
        return True

    def _stored(self, outpoint: OutPoint) -> Channel | None:
        """Return the stored version of an outpoint. Only this object writes, so that is the last version it wrote."""
        return self._newest.get(outpoint) or self._get(outpoint.serialize())

    def _enter(self, batch: plyvel.WriteBatch, outpoint: OutPoint, stored: Channel | None, channel: Channel) -> None:
        """Write a channel's record, and its index entry if the state changed; remember the channel."""
        key = outpoint.serialize()
        batch.put(RECORD + key, encode_record(channel))
        if stored is None or stored.state is not channel.state:
            batch.put(_index_key(channel.state, channel.terms.expiry.lock_time, key), b"")
            if stored is not None:
                batch.delete(_index_key(stored.state, stored.terms.expiry.lock_time, key))
        self._newest[outpoint] = channel
        self._newest.move_to_end(outpoint)
        if len(self._newest) > _REMEMBERED:
            self._newest.popitem(last=False)

    def _write(self, batch: plyvel.WriteBatch) -> None:
        """Write a batch, synced; runs in the writer's thread."""
        self._check()
        try:
            self.before_write(batch.approximate_size())
            batch.write()
        except Exception as error:
            raise self._failed(error) from error

    async def begin_log(self) -> None:
        """Write the content of LevelDB's log into a table and begin a new log; a short log stays."""
        await self._run(self._readers, self._begin_log)

    def _begin_log(self) -> None:
        if sum(log.stat().st_size for log in self._path.glob("*.log")) > WRITE_BUFFER_BYTES // 4:
            self._database.compact_range(**_BEHIND_ALL_KEYS)

    def _failed(self, error: Exception) -> StoreFailed:
        self._failure = error
        if isinstance(error, plyvel.CorruptionError):
            self._block_damaged(error_text(error))
            self._note_damage(error_text(error))
            msg = f"{error_text(error)}; the next start rebuilds the store from all records that can be read"
            return StoreDamaged(msg)
        return StoreFailed(error_text(error))

    # --- the end ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """See `Store`. Commits in progress are finished; a second call does nothing."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._snapshot_ended:
            self._closing = True
        self._writer.shutdown()
        self._readers.shutdown()
        with self._snapshot_ended:
            self._snapshot_ended.wait_for(lambda: not self._snapshots)
        if not self._database.closed:
            self._database.close()
            os.close(self._lock)

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[*Ts], T], *args: *Ts) -> T:
        try:
            future = asyncio.get_running_loop().run_in_executor(threads, function, *args)
        except RuntimeError as error:  # the threads are shut down
            raise StoreFailed(_CLOSED) from error
        try:
            return await future
        except plyvel.Error as error:
            raise StoreFailed(error_text(error)) from error


# --- keys and walks ---------------------------------------------------------------------------------------------------


def _index_begin(state: State, expiry: int) -> bytes:
    """Return the first key of the index entries of a state that expire at this time or later."""
    return INDEX + ((STATE_CODES[state] << 32) + min(max(expiry, 0), MAX_EXPIRY + 1)).to_bytes(5, "big")


def _index_key(state: State, expiry: int, outpoint: bytes) -> bytes:
    return _index_begin(state, expiry) + outpoint
