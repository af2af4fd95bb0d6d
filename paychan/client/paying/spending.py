"""The spending log of a wallet: one line for each payment, answer and refusal, in the order of their decisions.

`spend` compares the budget with the sums of the log and appends the payment under one lock, and syncs it, before the
payment's signature is made; so the limits hold for all processes of the wallet and across restarts. Only the last line can
be torn, since each append is synced before the next one: it is cut off, and its payment was never signed. Another line that
does not fit its CRC stops all paying.

A file that has grown to `FULL_BYTES` becomes `spending-N.log`, and the next one begins with its sums.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paychan.client.errors import Declined, LogInUse
from paychan.client.files import BINARY, check_mode, lock, sync_directory, write_private
from paychan.client.paying.account import Account, Carried, Line, Paid, declination, encoded, larger, parsed
from paychan.client.paying.budget import Budget, Sums
from paychan.client.paying.walletbudget import read_wallet_budget

NAME = "spending.log"
LOCK_SECONDS = 10.0
"""Longest wait for another process, which holds the lock for one sync of the disk."""

FULL_BYTES = 16 * 1024 * 1024
"""Size of a file of the log: a program reads it at its start, in about 0.1 s."""

_PAUSE_SECONDS = 0.002


class SpendingLog:
    """The log of one wallet. Threads may share it.

    Args:
        directory: the wallet's directory.
        wait_seconds: longest wait for another process.
        full_bytes: size at which the next file begins.
    """

    def __init__(self, directory: Path, wait_seconds: float = LOCK_SECONDS, *, full_bytes: int = FULL_BYTES) -> None:
        self.path = directory / NAME
        self._wait_seconds, self._full_bytes, self._mutex = wait_seconds, full_bytes, threading.Lock()
        self._read_bytes, self._inode, self._account = 0, 0, Account()

    def spend(self, budget: Budget, paid: Paid) -> Declined | None:
        """Append a payment, durably, if the budget covers its price; else append the refusal, and return it.

        Raises:
            LogInUse, DamagedFile, LaterFile, LooseMode, OSError: nothing may be signed.
        """
        with self._locked() as file:
            account = self._account
            before_sat = paid.price_sat - paid.counted_sat
            problem = self._problem(budget, paid.host, paid.price_sat, account.sums(paid.host, paid.at), before_sat)
            if problem is not None:
                self._append(file, declination(problem, paid.at, paid.host, paid.method, paid.url, paid.price_sat))
                return problem
            self._append(file, paid)
            return None

    def problem(self, budget: Budget, host: str, price_sat: int, now: int, before_sat: int = 0) -> Declined | None:
        """Return why the program's budget or the wallet's own does not cover a request now, or None.

        Raises:
            LogInUse, DamagedFile, LaterFile, LooseMode, OSError: nothing may be signed.
        """
        return self._problem(budget, host, price_sat, self.account().sums(host, now), before_sat)

    def _problem(self, budget: Budget, host: str, price_sat: int, sums: Sums, before_sat: int) -> Declined | None:
        own = read_wallet_budget(self.path.parent)
        return budget.problem(host, price_sat, sums, before_sat) or own.problem(host, price_sat, sums, before_sat)

    def take_over(self, carried: Carried) -> None:
        """Raise the sums to those of a backup, where these are larger."""
        with self._locked() as file:
            mine = self._account.carried(carried.at)
            joined = larger(mine, carried)
            if joined != mine:
                self._append(file, joined)

    def note(self, line: Line) -> None:
        """Append a line that follows from an answer, durably: so only the last line of the log can be torn."""
        with self._locked() as file:
            self._append(file, line)

    def account(self) -> Account:
        """Read the lines that other processes appended, and return the sums. Do not change them."""
        with self._locked():
            return self._account

    def lines(self) -> Iterator[Line]:
        """Read all lines of all files again, the oldest first."""
        with self._locked():
            parts = [*(path for path in self._full_files() if not path.samefile(self.path)), self.path]
            raws = [(path.read_bytes(), path) for path in parts]
        return (line for raw, path in raws for line, _ in parsed(raw, path))

    def _full_files(self) -> list[Path]:
        found = self.path.parent.glob("spending-*.log")
        return sorted(found, key=lambda path: int(path.stem.removeprefix("spending-")))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock; the account has all lines, and a torn last line is cut off."""
        with self._mutex:
            descriptor = self._open()
            try:
                self._catch_up(descriptor)
                yield descriptor
                if self._read_bytes >= self._full_bytes:
                    self._begin_next()
            finally:
                os.close(descriptor)

    def _open(self) -> int:
        """Open and lock the newest file: another process may begin the next one in between."""
        while True:
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o600)
            try:
                check_mode(self.path, os.fstat(descriptor))
                self._wait_for(descriptor)
                if is_new:
                    sync_directory(self.path.parent)
                if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _begin_next(self) -> None:
        """Give the full file another name, and begin the next one with its sums. A crash leaves the one or the other."""
        full = self._full_files()
        number = 1 + (int(full[-1].stem.removeprefix("spending-")) if full else 0)
        write_private(self.path.with_name(".spending-next"), encoded(self._account.carried(int(time.time()))))
        if not full or not full[-1].samefile(self.path):  # else a crash came before the replacement
            os.link(self.path, self.path.with_name(f"spending-{number}.log"))
        self.path.with_name(".spending-next").replace(self.path)
        sync_directory(self.path.parent)

    def _wait_for(self, descriptor: int) -> None:
        end = time.monotonic() + self._wait_seconds
        while True:
            try:
                return lock(descriptor)
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise LogInUse(path=self.path, seconds=self._wait_seconds) from None
                time.sleep(_PAUSE_SECONDS)

    def _catch_up(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        size = found.st_size
        if size < self._read_bytes or found.st_ino != self._inode:  # another file, such as a restored backup
            self._read_bytes, self._inode, self._account = 0, found.st_ino, Account()
        if size == self._read_bytes:
            return
        os.lseek(descriptor, self._read_bytes, os.SEEK_SET)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            raw = file.read(size - self._read_bytes)
        whole = 0
        for line, end in parsed(raw, self.path):
            self._account.add(line)
            whole = end
        self._read_bytes += whole
        if whole < len(raw):
            os.ftruncate(descriptor, self._read_bytes)
            os.fsync(descriptor)

    def _append(self, descriptor: int, line: Line) -> None:
        raw = encoded(line)
        written = os.write(descriptor, raw)
        if written != len(raw):
            os.ftruncate(descriptor, self._read_bytes)
            msg = f"{self.path}: wrote {written} of {len(raw)} bytes"
            raise OSError(msg)
        os.fsync(descriptor)
        self._account.add(line)
        self._read_bytes += written
