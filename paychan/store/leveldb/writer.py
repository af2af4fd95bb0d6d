"""The writing half of the store: conditional commits, and the one thread that writes them.

If all channels of a commit are in memory, the loop prepares the batch and the thread only writes it: each switch between
Python threads costs as much as preparing several records.

`ThreadPoolExecutor` creates a future with a lock for each function and chains it to asyncio's: that costs more than
encoding a whole group of payments. And an eventfd wakes the thread, not a lock: Python releases the interpreter while
it writes to an eventfd, so on a busy core the thread can start at once, instead of waking only to wait for the
interpreter.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar, TypeVarTuple

import plyvel

from paychan.protocol.channel import Channel
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.record import encode_record
from paychan.protocol.types import OutPoint
from paychan.shared.leveldb_files import error_text
from paychan.store.base import Change, StoreDamaged, StoreFailed
from paychan.store.leveldb.keys import RECORD, index_key, message_key

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Announce: TypeAlias = Callable[[Channel | None, Channel], Sequence[bytes]]
"""Returns the messages about a change of a channel's state, from the record before, if any, and the new one."""

CLOSED = "the store is closed"

_REMEMBERED = 20_000
"""Channels whose newest version is kept in memory, a few kB each: a payment must follow the last written version."""


class _Known:
    """A channel's database key and its newest written version."""

    __slots__ = ("channel", "key")

    def __init__(self, key: bytes, channel: Channel) -> None:
        self.key, self.channel = key, channel


class WriterThread:
    """Runs functions in the order of the calls."""

    def __init__(self, name: str) -> None:
        self._work: deque[Any] = deque()
        self._wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self.unfinished = 0
        """Number of functions that are not finished, as the loop sees it; includes those whose caller was cancelled."""
        self._order = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a function after all functions passed before.

        Raises:
            RuntimeError: the thread is shut down.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._order:  # no function may be queued after the shutdown
            if self._closed:
                msg = "shut down"
                raise RuntimeError(msg)
            self.unfinished += 1
            self._work.append((loop, done, function, args))
            os.eventfd_write(self._wakeup_fd, 1)
        return await done

    def shutdown(self) -> None:
        """Finish the queued functions and stop the thread. Blocks; a second call only waits."""
        with self._order:
            is_first, self._closed = not self._closed, True
            if is_first:
                os.eventfd_write(self._wakeup_fd, 1)
        self._thread.join()
        if is_first:
            os.close(self._wakeup_fd)  # not by the thread: it may have seen the shutdown before the write above

    def _serve(self) -> None:
        """Run the queue.

        If the loop itself fails, no further function is accepted, and waiting callers get an error.
        """
        try:
            self._run_queue()
        finally:
            self._closed = True
            for loop, done, _, _ in self._work:
                self._answer(loop, done, None, RuntimeError("the thread has ended"))

    def _run_queue(self) -> None:
        while self._work or not self._closed:
            if not self._work:
                os.eventfd_read(self._wakeup_fd)
                continue
            loop, done, function, args = self._work.popleft()
            try:
                value, error = function(*args), None
            except BaseException as raised:  # noqa: BLE001 - the caller receives it
                value, error = None, raised
            self._answer(loop, done, value, error)

    def _answer(self, loop: asyncio.AbstractEventLoop, done: Any, value: Any, error: BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no caller waits
            loop.call_soon_threadsafe(self._deliver, done, value, error)

    def _deliver(self, done: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        self.unfinished -= 1
        if done.done():  # the caller was cancelled
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(value)


class Writer(WriterThread):
    """Writes the records of one database. `read` returns a stored channel; `damaged` notes the reason of damage.

    `lock` is the descriptor of the file `lock_path` in its directory, which is open as long as the database.
    """

    def __init__(
        self,
        database: plyvel.DB,
        lock: int,
        lock_path: Path,
        read: Callable[[bytes], Channel | None],
        damaged: Callable[[str], None],
    ) -> None:
        super().__init__("store-writer")
        self._database, self._lock, self._read, self._damaged = database, lock, read, damaged
        self._lock_path = os.fspath(lock_path)
        self._known: OrderedDict[OutPoint, _Known] = OrderedDict()
        self._failure: Exception | None = None
        self._low_bytes = 0
        self.announce: Announce = _no_messages
        """Returns the messages that are written together with a change of state; must not raise. Called in any thread."""

    def guard_disk(self, low_bytes: int, make_room: Callable[[int], None]) -> None:
        """Before a write, call `make_room` with its bytes if less than `low_bytes` are free; in the writer's thread."""
        self._low_bytes, self._make_room = low_bytes, make_room

    async def commit(self, changes: Sequence[Change]) -> Sequence[bool]:
        """See `Store`. After a failure all later calls fail, too: the content of LevelDB's log is unknown."""
        try:
            if self.unfinished or not self._known.keys() >= {change.channel.outpoint for change in changes}:
                return await self.run(self._commit, changes)
            batch, written = self._prepare(changes)
            if batch is not None:
                await self.run(self._write, batch)
        except RuntimeError as error:  # the thread is shut down
            raise StoreFailed(CLOSED) from error
        else:
            return written

    def _commit(self, changes: Sequence[Change]) -> Sequence[bool]:
        """Prepare and write in the writer's thread: a record must be read first, or earlier commits are pending."""
        batch, written = self._prepare(changes)
        if batch is not None:
            self._write(batch)
        return written

    def _prepare(self, changes: Sequence[Change]) -> tuple[plyvel.WriteBatch | None, Sequence[bool]]:
        """Make one batch of the changes that follow the stored versions; return for each change whether it does.

        From here on, later changes must follow the batch: if it is not written, no later batch is written either.
        """
        if self._failure is not None:
            raise self._failed_before(self._failure)
        newest: dict[OutPoint, Change] = {}
        try:
            written = [self._admit(change, newest) for change in changes]
            batch = self._database.write_batch(sync=True) if newest else None
            for change in newest.values():  # readers never see the versions in between
                self._enter(batch, change.previous, change.channel)
        except Exception as error:
            raise self._failed(error) from error
        return batch, written

    def _admit(self, change: Change, newest: dict[OutPoint, Change]) -> bool:
        """Add a change to the batch if it follows the stored version or the one already in the batch."""
        outpoint, previous = change.channel.outpoint, change.previous
        earlier = newest.get(outpoint)
        if earlier is not None:
            stored: Channel | None = earlier.channel
        elif (known := self._known.get(outpoint)) is not None:
            stored = known.channel
        else:
            try:
                stored = self._read(outpoint.serialize())
            except DamagedRecord:
                return False  # not the version that the writer has read; the damaged record stays as evidence
        if stored is not previous and stored != previous:
            return False  # the number alone does not suffice: another writer may have reached the same one
        newest[outpoint] = change if earlier is None else Change(earlier.previous, change.channel)
        return True

    def _enter(self, batch: plyvel.WriteBatch, stored: Channel | None, channel: Channel) -> None:
        """Write a channel's record, and its index entry if the state changed; remember the channel."""
        outpoint = channel.outpoint
        known = self._known.get(outpoint)
        if known is None:
            known = self._known[outpoint] = _Known(RECORD + outpoint.serialize(), channel)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        else:
            known.channel = channel
            self._known.move_to_end(outpoint)
        key = known.key
        batch.put(key, encode_record(channel))
        if stored is None or stored.state is not channel.state:
            batch.put(index_key(channel.state, channel.terms.expiry.lock_time, key[1:]), b"")
            if stored is not None:
                batch.delete(index_key(stored.state, stored.terms.expiry.lock_time, key[1:]))
            for number, message in enumerate(self.announce(stored, channel)):
                batch.put(message_key(key[1:], channel.seq, number), message)

    async def remove(self, key: bytes) -> None:
        """Remove a message that was delivered, without a sync: after a power cut it may be there again."""
        batch = self._database.write_batch(sync=False)
        batch.delete(key)
        try:
            await self.run(self._write, batch)
        except RuntimeError as error:  # the thread is shut down
            raise StoreFailed(CLOSED) from error

    def _write(self, batch: plyvel.WriteBatch) -> None:
        """Write a batch, synced; runs in the writer's thread."""
        if self._failure is not None:
            raise self._failed_before(self._failure)
        try:
            if self._is_moved:
                self._fail_moved()
            if self._low_bytes:
                disk = os.statvfs(self._lock)
                if disk.f_bavail * disk.f_frsize < self._low_bytes:
                    self._make_room(batch.approximate_size())
            batch.write()
        except Exception as error:
            raise self._failed(error) from error

    @property
    def _is_moved(self) -> bool:
        """Whether the open store is no longer at its path: `leveldb_files.is_at`, here to keep a payment's road short."""
        try:
            return not os.path.samestat(os.stat(self._lock_path), os.fstat(self._lock))  # noqa: PTH116 - it is faster
        except (FileNotFoundError, NotADirectoryError):
            return True

    def _fail_moved(self) -> NoReturn:
        """Write nothing into a removed or moved store: LevelDB goes on writing into files that no start finds."""
        msg = "the store's directory was removed, or moved away from its path"
        raise StoreFailed(msg)

    def _failed_before(self, failure: Exception) -> StoreFailed:
        return StoreFailed(f"an earlier write failed: {error_text(failure)}")

    def _failed(self, error: Exception) -> StoreFailed:
        self._failure = error
        if isinstance(error, plyvel.CorruptionError):
            self._damaged(error_text(error))
            msg = f"{error_text(error)}; the next start rebuilds the store from all records that can be read"
            return StoreDamaged(msg)
        return StoreFailed(error_text(error))


def _no_messages(_before: Channel | None, _after: Channel) -> Sequence[bytes]:
    return ()
