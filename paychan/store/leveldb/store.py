"""The default store: one LevelDB directory, used by one process.

Keys (`keys.py`): a channel has one record and one index entry, which moves in the batch that writes the record; messages
to the application wait beside them. `z`, with
format and network, sorts behind all others on purpose: plyvel ends a walk without an error when the last blocks are damaged, so a walk that met no key behind its range was truncated.

Damage: a record or a block that can't be read is counted in `damage` and left out, and all others are found: where the
index is damaged, from the records. LevelDB itself writes no more as soon as it has to compact a damaged block. So the
first damage also leaves a note in the directory, and the next start of the server rebuilds the store (`backup/rebuild.py`).

Threads: one thread writes (`writer.py`), so commits are in order and the loop never waits for the disk. Two threads
read, so a long scan delays neither a commit nor the reading of one channel.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import plyvel
import structlog
from msgspec.structs import replace

from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.expiry import MAX_EXPIRY
from paychan.protocol.record import decode_record
from paychan.protocol.types import OutPoint
from paychan.shared.leveldb_files import error_text
from paychan.store.base import Damage, Message, StoreFailed
from paychan.store.leveldb.directory import (
    LOCK_NAME,
    WHAT_TO_DO,
    WRITE_BUFFER_BYTES,
    note_damage,
    noted_damage,
    open_directory,
)
from paychan.store.leveldb.entries import UNREADABLE, MissingKeys, entries
from paychan.store.leveldb.keys import (
    MESSAGE,
    OUTPOINT_BYTES,
    RECORD,
    index_begin,
    index_key,
    outpoint_of_message,
    read_outpoint,
)
from paychan.store.leveldb.writer import CLOSED, Announce, Writer

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger("store")

_RECORDS_END, _MESSAGES_END = bytes([RECORD[0] + 1]), bytes([MESSAGE[0] + 1])

_READERS = 2

_BEHIND_ALL_KEYS = {"start": b"\xfe", "stop": b"\xff"}
"""LevelDB compacts no table of this range, but first writes its log into a table."""


class LevelDbStore:
    """`paychan.store.base.Store` on LevelDB. Create it with `open`."""

    def __init__(self, path: Path, database: plyvel.DB, lock: int) -> None:
        self._path, self._database = path, database
        self._lock = lock
        self._writer = Writer(database, lock, path / LOCK_NAME, self._get, self._write_damaged)
        self.commit = self._writer.commit
        self.delivered = self._writer.remove
        self.guard_disk = self._writer.guard_disk
        self._readers = ThreadPoolExecutor(_READERS, "store-reader")
        together = threading.Barrier(_READERS)  # starts all threads now, while there is memory for them
        wait([self._readers.submit(together.wait) for _ in range(_READERS)])
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
        begin = index_begin(state, 0)
        if after is not None:
            begin = index_key(state, after[0], after[1].serialize()) + b"\x00"  # the next possible key
        return await self._run(self._readers, self._scan, begin, index_begin(state, before), limit)

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
        return channel if index_key(channel.state, channel.terms.expiry.lock_time, outpoint) == key else None

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
                        yield index_key(channel.state, channel.terms.expiry.lock_time, key[1:])

            with closing(entries(moment, RECORD, _RECORDS_END, self._block_damaged, fill_cache=False)) as records:
                self._missing.search(keys(), is_readable)

    # --- messages ---------------------------------------------------------------------------------------------------

    def announce_by(self, announce: Announce) -> None:
        """Write the messages that this function returns together with each change of a channel's state.

        It is called with the record before, if any, and the new one, in any thread. It must not raise.
        """
        self._writer.announce = announce

    async def messages(self, after: bytes = b"", limit: int = 100) -> Sequence[Message]:
        """See `Store`."""
        return await self._run(self._readers, self._messages, after + b"\x00" if after else MESSAGE, limit)

    def _messages(self, begin: bytes, limit: int) -> list[Message]:
        with (
            self._database.snapshot() as moment,
            closing(entries(moment, begin, _MESSAGES_END, self._block_damaged)) as found,
        ):
            return [Message(key, outpoint_of_message(key), body) for key, body in islice(found, limit)]

    # --- damage -----------------------------------------------------------------------------------------------------

    @property
    def damage(self) -> Damage:
        """See `Store`."""
        return self._damage

    def _record_damaged(self, outpoint: bytes, reason: str) -> None:
        channel = read_outpoint(outpoint)
        if channel not in self._damage.records:
            self._damage = replace(self._damage, records={**self._damage.records, channel: reason})
            log.error("damaged record", channel=str(channel), reason=reason)
            self._note_damage(reason)

    def _block_damaged(self, reason: str) -> None:
        if not self._damage.block:
            self._damage = replace(self._damage, block=reason)
            log.error("damaged block", path=str(self._path), reason=reason)
            self._note_damage(reason)

    def _write_damaged(self, reason: str) -> None:
        self._block_damaged(reason)
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
                raise StoreFailed(CLOSED)
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
                    raise StoreFailed(CLOSED)
                yield raw

    def _unreadable(self, reason: str) -> None:
        self._block_damaged(reason)
        msg = f"{self._path} is damaged ({reason}); {WHAT_TO_DO}"
        raise StoreFailed(msg)

    async def begin_log(self) -> None:
        """Write the content of LevelDB's log into a table and begin a new log; a short log stays."""
        await self._run(self._readers, self._begin_log)

    def _begin_log(self) -> None:
        if sum(log.stat().st_size for log in self._path.glob("*.log")) > WRITE_BUFFER_BYTES // 4:
            self._database.compact_range(**_BEHIND_ALL_KEYS)

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
            raise StoreFailed(CLOSED) from error
        try:
            return await future
        except plyvel.Error as error:
            raise StoreFailed(error_text(error)) from error
