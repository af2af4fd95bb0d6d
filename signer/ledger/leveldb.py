"""The ledger on disk: everything that was shown, signed and settled, in a small LevelDB, and the log of all decisions.

Nothing in it is secret, and no coin depends on it: without it, the rules that use earlier events start from nothing.
LevelDB's own lock admits one process at a time.

    outpoint (36 bytes)   `entries.Signed`: its newest signed settlement
    f + outpoint          `entries.Output`: the output, as it was shown
    w + outpoint          `settlement.Claim`: the newest payment of this channel that was shown
    q + request digest    the request, to sign it again
    t + request digest    the signed settlement, to return it again
    n                     number of outputs that were shown
    v                     `entries.Flow`: value settled recently
    h                     the last line of the audit log that belongs to these entries
    p                     empty; a test write: LevelDB begins a new log only after enough values

The next `read` sees a put entry at once; the entry is on disk when the awaited `put` returns. One thread collects the entries
of a few milliseconds and writes them together, first to the audit log, then here. A failed write ends the process
(`vital`): the state of the disk is unknown, so nothing more is signed until the signer is started again. `put(Entry())`
changes no entry but makes the same steps, and so tests whether a write succeeds.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import plyvel
from msgspec import Struct

from paychan.protocol.settlement import Claim, Settlement
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest
from paychan.shared.leveldb_files import error_text, is_at
from signer import vital
from signer.audit.access import AuditFailed
from signer.audit.chain import BEGINNING, AuditBroken, Decision, Head
from signer.audit.file import AuditFile
from signer.ledger.base import Entry, LedgerFailed
from signer.ledger.entries import Count, DamagedEntry, Entries, Flow, Output, Signed, decode_entry, encode_entry
from signer.ledger.opening import opened
from signer.ledger.shown import shown_after

_GATHERING_SECONDS = 0.004
"""A write begins this time after the first request for it. Without the delay, several requests at once would cost more
in syncs and thread switches than in the data itself."""

_HANGING_SECONDS = 10.0
"""A write that takes longer is reported as a problem; a slow disk syncs within one second."""

_COUNT, _FLOW, _HEAD, _PROBE = b"n", b"v", b"h", b"p"

_TXID_BYTES, _MAX_VOUT = 32, 0xFFFFFFFF

_Kind = TypeVar("_Kind", bound=Struct)


class Group:
    """Values that are written together. Awaiting it waits until they are on disk, and raises `LedgerFailed`.

    The loop is woken once for all waiters; one that is cancelled disturbs no other.
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
        self._failure = failure
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and nothing waits
                self._loop.call_soon_threadsafe(self._wake)

    def __await__(self) -> Generator[Any, None, None]:
        if self._failure is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            yield from waiter
        if self._failure:
            raise LedgerFailed(self._failure)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class LevelDbLedger:
    """A `Ledger` on disk."""

    def __init__(
        self,
        path: Path,
        audit: Path,
        *,
        audit_file_bytes: int = 0,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open the directory and the log, or create them.

        Args:
            path: LevelDB's directory.
            audit: the log's file.
            audit_file_bytes: size at which the log continues in a new file; 0: never.
            on_failure: called by the writing thread with the reason of a failed write; then all later calls fail.

        Raises:
            LedgerFailed: in use, damaged, of another kind, not accessible, or lines are missing at the end of the log.
        """
        self._failure = self._read_failure = ""
        self._path, self._on_failure, self._low_bytes = path, on_failure, 0
        self._written_at = UnixTime(0)
        self._begun_at = 0.0
        """Start of the current write, by the monotonic clock; 0: there is none."""
        self._database = opened(path)
        self._log_sizes = dict[str, int]()
        """Sizes of LevelDB's logs before the last write."""
        try:
            self._audit = AuditFile(audit, audit_file_bytes)
        except (AuditFailed, AuditBroken) as error:
            self._database.close()
            raise LedgerFailed(str(error)) from error
        self._place = os.open(path, os.O_DIRECTORY)
        self._gathering, self._writing = Group(), Group()
        self._work = threading.Condition()
        self._begin(audit)
        self._writer = vital.start_thread("ledger", self._write_all)

    def _begin(self, audit: Path) -> None:
        """Load the state that is kept in memory, and check that the log still has its last line."""
        try:
            flow, count, head = (self._get(key) for key in (_FLOW, _COUNT, _HEAD))
            self._flow = Flow() if flow is None else decode_entry(flow, Flow)
            self._shown = 0 if count is None else decode_entry(count, Count).number
            known = BEGINNING if head is None else decode_entry(head, Head)
        except (DamagedEntry, LedgerFailed) as error:
            self._give_up()
            raise LedgerFailed(str(error)) from error
        try:
            is_held = self._audit.holds(known)
        except (AuditBroken, OSError):
            is_held = False
        if not is_held:
            self._give_up()
            msg = (
                f"{audit} does not hold line {known.count}, which was written: restore the file, or start a new log with "
                f"`paychan-signer audit archive FILE --after {known}`"
            )
            raise LedgerFailed(msg)

    def _give_up(self) -> None:
        self._audit.close()
        if not self._database.closed:
            self._database.close()
            os.close(self._place)

    def guard_disk(self, low_bytes: int, make_room: Callable[[Mapping[bytes, bytes], int], None]) -> None:
        """Before a write, call `make_room` with its values and number of audit lines if less than `low_bytes` are free.

        The thread that writes calls it.
        """
        self._low_bytes, self._make_room = low_bytes, make_room

    @property
    def torn_bytes(self) -> int:
        """Bytes of an unfinished line, left by a crash, that were cut off the audit log when it was opened."""
        return self._audit.torn_bytes

    @property
    def flow(self) -> Flow:
        """See `Ledger`."""
        return self._flow

    @property
    def shown(self) -> int:
        """See `Ledger`."""
        return self._shown

    @property
    def head(self) -> Head:
        """See `Ledger`."""
        return self._audit.head

    @property
    def written_at(self) -> UnixTime:
        """See `Ledger`."""
        return self._written_at

    @property
    def problem(self) -> str:
        """See `Ledger`."""
        begun_at = self._begun_at
        if not self._failure and begun_at and time.monotonic() - begun_at > _HANGING_SECONDS:
            return f"a write to {self._path} has not ended for {time.monotonic() - begun_at:.0f} s"
        return self._failure or self._read_failure

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        """See `Ledger`."""
        return self._entries(outpoints, b"", Signed)

    def newest(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Claim]:
        """See `Ledger`."""
        return self._entries(outpoints, b"w", Claim)

    def shown_after(self, after: OutPoint | None, limit: int) -> list[tuple[OutPoint, Claim | None]]:
        """See `Ledger`. An entry that is not on disk yet may be missing."""
        self._check()
        return shown_after(self._database, after, limit)

    def outputs(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Output]:
        """See `Ledger`."""
        return self._entries(outpoints, b"f", Output)

    def request(self, digest: bytes) -> SettlementRequest | None:
        """See `Ledger`."""
        raw = self._get(b"q" + digest)
        return None if raw is None else decode_entry(raw, SettlementRequest)

    def settlement(self, digest: bytes) -> Settlement | None:
        """See `Ledger`."""
        raw = self._get(b"t" + digest)
        return None if raw is None else decode_entry(raw, Settlement)

    def put(self, entry: Entry) -> Group:
        """See `Ledger`."""
        values = {outpoint.serialize(): encode_entry(signed) for outpoint, signed in entry.signed.items()}
        if entry.request is not None:
            values[b"q" + entry.digest] = encode_entry(entry.request)
        if entry.outputs:
            values |= {b"f" + outpoint.serialize(): encode_entry(output) for outpoint, output in entry.outputs.items()}
            self._shown += len(entry.outputs)
            values[_COUNT] = encode_entry(Count(self._shown))
        values |= {b"w" + outpoint.serialize(): encode_entry(claim) for outpoint, claim in entry.newest.items()}
        if entry.flow is not None:
            self._flow = entry.flow
            values[_FLOW] = encode_entry(entry.flow)
        with self._work:
            group = self._gather(values)
            group.decisions += entry.decisions
            group.join()
        return group

    def keep(self, digest: bytes, settlement: Settlement) -> None:
        """See `Ledger`."""
        value = encode_entry(settlement)
        with self._work:
            self._gather({b"t" + digest: value})

    def _gather(self, values: Mapping[bytes, bytes]) -> Group:
        """Add values to the next write. The caller holds `_work`."""
        self._check()
        group = self._gathering
        if group.is_empty:
            self._work.notify()
        group.values.update(values)
        return group

    def close(self) -> None:
        """Finish pending writes, and close directory and log; later calls fail."""
        with self._work:
            self._failure = self._failure or "closed"
            self._work.notify()
        self._writer.join()
        self._give_up()

    def _write_all(self) -> None:
        """Write group after group; runs in a separate thread until closed."""
        while True:
            with self._work:
                while self._gathering.is_empty:
                    if self._failure:
                        return
                    self._work.wait()
            time.sleep(_GATHERING_SECONDS)
            self._begun_at = time.monotonic()
            with self._work:  # in this order: a value is always in one of them, or in the database
                self._writing = group = self._gathering
                self._gathering = Group()
            failure = self._write(group)
            self._begun_at = 0.0
            group.written(failure)

    def _write(self, group: Group) -> str:
        """Write a group, the log first: a crash between the two leaves an extra line, never a missing one.

        Return the reason of a failure, or an empty text.
        """
        if self._failure not in ("", "closed"):
            return self._failure
        try:
            self._check_place()
            if self._low_bytes:
                disk = os.statvfs(self._path)
                if disk.f_bavail * disk.f_frsize < self._low_bytes:
                    self._make_room(group.values, len(group.decisions))
            batch = self._database.write_batch(sync=group.is_awaited)
            if group.decisions:
                batch.put(_HEAD, encode_entry(self._audit.append(group.decisions)))
            elif not group.values:
                batch.put(_PROBE, b"")
            for key, value in group.values.items():
                batch.put(key, value)
            batch.write()
        except Exception as error:  # noqa: BLE001 - after any error the state of the disk is unknown
            return self._fail(error)
        self._writing = Group()
        if group.is_awaited:
            self._written_at = UnixTime(int(time.time()))
        return ""

    def _check_place(self) -> None:
        """Check that the next start reads the files that are written now. Raises OSError, `AuditFailed`.

        LevelDB continues to write to a file that was removed or truncated, and does not notice at its next start.
        """
        self._audit.check()
        is_there = is_at(self._path, self._place) and os.access(self._path / "CURRENT", os.R_OK)
        if not is_there or not os.access(self._path, os.W_OK | os.X_OK):
            raise OSError(f"{self._path} was removed or moved, or can't be written any more")  # noqa: TRY003, EM102
        try:
            sizes = _sizes_of_logs(self._path)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return  # no fault is known; the next write checks again
            raise
        if not sizes or any(sizes[name] < size for name, size in self._log_sizes.items() if name in sizes):
            raise OSError(f"{self._path} has lost data of its log")  # noqa: TRY003, EM102
        self._log_sizes = sizes

    def _fail(self, error: Exception) -> str:
        self._failure = f"a write failed ({error_text(error)}): check the disk, then start the signer again"
        self._on_failure(self._failure)
        return self._failure

    def _entries(self, outpoints: Collection[OutPoint], prefix: bytes, kind: type[_Kind]) -> dict[OutPoint, _Kind]:
        found: dict[OutPoint, _Kind] = {}
        for outpoint in outpoints:
            if len(outpoint.txid) != _TXID_BYTES or not 0 <= outpoint.vout <= _MAX_VOUT:
                continue  # no such key exists; policy-template will refuse it
            try:
                raw = self._get(prefix + outpoint.serialize())
                if raw is not None:
                    found[outpoint] = decode_entry(raw, kind)
            except DamagedEntry as error:
                msg = f"the ledger's entry of {outpoint} can't be read: {error_text(error)}"
                raise DamagedEntry(msg) from error
        return found

    def _get(self, key: bytes) -> bytes | None:
        self._check()
        for group in (self._gathering, self._writing):
            unwritten = group.values.get(key)
            if unwritten is not None:
                return unwritten
        try:
            raw: bytes | None = self._database.get(key, verify_checksums=True)
        except plyvel.CorruptionError as error:
            raise DamagedEntry(error_text(error)) from error
        except plyvel.Error as error:
            msg = self._read_failure = f"can't be read ({error_text(error)})"
            raise LedgerFailed(msg) from error
        return raw

    def _check(self) -> None:
        if self._failure:
            raise LedgerFailed(self._failure)


def _sizes_of_logs(path: Path) -> dict[str, int]:
    """Sizes of the logs that LevelDB would read at its next start; there is always one. Raises OSError."""
    sizes = {}
    with os.scandir(path) as files:
        for file in files:
            if file.name.endswith(".log"):
                with suppress(FileNotFoundError):  # LevelDB removes an old one some time after it has created a new one
                    sizes[file.name] = file.stat().st_size
    return sizes
