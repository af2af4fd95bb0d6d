"""The spending log of a wallet: one line for each payment, answer and refusal, in the order of their decisions.

A line is JSON, a space, and the CRC-32 of the JSON. `spend` compares the budget with the sums of the log and appends the
payment under one lock, and syncs it, before the payment's signature is made; so the limits hold for all processes of the
wallet and across restarts. Only the last line can be torn, since each append is synced before the next one: it is cut off,
and its payment was never signed. Another line that does not fit its CRC stops all paying.

Prices count when they are agreed on. No later line lowers a sum, because such lines follow from answers of servers.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from paychan.client.errors import DamagedFile, Declined, LogInUse
from paychan.client.files import BINARY, check_mode, lock, sync_directory
from paychan.client.paying.budget import Budget, Sums

NAME = "spending.log"
DAY_SECONDS = 86_400
LOCK_SECONDS = 10.0
"""Longest wait for another process, which holds the lock for one sync of the disk."""

_PAUSE_SECONDS = 0.002
_MOST_TEXT = 2048
_KEPT_ANSWERS = 10_000
"""Paid requests without an answer that are kept in memory at most; older ones are paid anew."""


class Paid(Struct, frozen=True, tag="paid", tag_field="line", omit_defaults=True):
    """A payment that was decided: its signature may have left the wallet."""

    request: str
    """Id of the request, which the server gets: the same for each try."""
    key: str
    """Digest of method, URL and body."""
    at: int
    """Unix time."""
    host: str
    """`host:port`, as requested."""
    method: str
    url: str
    channel: str
    """Outpoint of the channel, `txid:vout`."""
    price_sat: int
    change_sat: int
    """Change value of the newest payment of the channel, which pays for this request."""
    counted_sat: int
    """Part of the price that no earlier line of this request has counted."""
    raised_sat: int = 0
    """Sum by which this request's tries raised the signed sum of the channel together."""


class Answered(Struct, frozen=True, tag="answered", tag_field="line", omit_defaults=True):
    """The answer to a paid request: the request is finished."""

    request: str
    at: int
    status: int
    channel: str
    spent_sat: int
    """Sum of all charges of the channel after it, as the wallet expects it."""
    charged_sat: int
    receipt: str = ""
    """`PAYMENT-RESPONSE` or `Payment-Receipt`, as received."""


class Unpaid(Struct, frozen=True, tag="unpaid", tag_field="line", omit_defaults=True):
    """The server answered a paid request with 402. The request is open: its next try costs nothing more."""

    request: str
    at: int
    code: str
    reason: str


class Corrected(Struct, frozen=True, tag="corrected", tag_field="line", omit_defaults=True):
    """The sum of all charges of a channel, as a server corrected it."""

    channel: str
    at: int
    spent_sat: int


class Declination(Struct, frozen=True, tag="declined", tag_field="line", omit_defaults=True):
    """A payment that the budget or its `approve` did not allow, or that the wallet could not make."""

    at: int
    host: str
    method: str
    url: str
    price_sat: int
    code: str
    reason: str


Line: TypeAlias = Paid | Answered | Unpaid | Corrected | Declination

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Line)


class Account:
    """Sums and open requests that follow from the lines of a log."""

    def __init__(self) -> None:
        self.total_sat = 0
        self.by_host: dict[str, int] = {}
        self.by_day: dict[int, dict[str, int]] = {}
        """Sums by day (number since 1970-01-01) and host."""
        self.open: dict[str, Paid] = {}
        """The newest paid request without a good answer, by `Paid.key`."""
        self.unpaid: set[str] = set()
        """Names of open requests that the server answered with 402; the answers to the others were lost."""
        self.spent: dict[str, int] = {}
        """Expected sum of all charges of a channel, by outpoint."""
        self.signed: dict[str, int] = {}
        """Least change value that was decided for a channel, by outpoint: a crash may have kept it out of the wallet."""
        self.declined = 0
        self._keys: dict[str, str] = {}

    def sums(self, host: str, now: int) -> Sums:
        """Return the sums that limits compare. A day has also what a fast clock wrote for later days."""
        today = now // DAY_SECONDS
        day_sat = sum(sum(hosts.values()) for day, hosts in self.by_day.items() if day >= today)
        return Sums(self.by_host.get(host, 0), day_sat, self.total_sat)

    def add(self, line: Line) -> None:
        match line:
            case Paid():
                self.total_sat += line.counted_sat
                self.by_host[line.host] = self.by_host.get(line.host, 0) + line.counted_sat
                hosts = self.by_day.setdefault(line.at // DAY_SECONDS, {})
                hosts[line.host] = hosts.get(line.host, 0) + line.counted_sat
                self._enter(line)
            case Answered():
                self.spent[line.channel] = line.spent_sat
                self._close(line.request)
            case Corrected():
                self.spent[line.channel] = line.spent_sat
            case Declination():
                self.declined += 1
            case Unpaid():
                if line.request in self._keys:
                    self.unpaid.add(line.request)

    def _enter(self, line: Paid) -> None:
        earlier = self.open.pop(line.key, None)
        if earlier is not None:
            self._close(earlier.request)
        self.open[line.key] = line
        self._keys[line.request] = line.key
        self.signed[line.channel] = min(line.change_sat, self.signed.get(line.channel, line.change_sat))
        if len(self.open) > _KEPT_ANSWERS:
            self._close(next(iter(self.open.values())).request)

    def _close(self, request: str) -> None:
        key = self._keys.pop(request, "")
        self.unpaid.discard(request)
        if key in self.open and self.open[key].request == request:
            del self.open[key]


class SpendingLog:
    """The log of one wallet. Threads may share it.

    Args:
        directory: the wallet's directory.
        wait_seconds: longest wait for another process.
    """

    def __init__(self, directory: Path, wait_seconds: float = LOCK_SECONDS) -> None:
        self.path = directory / NAME
        self._wait_seconds, self._mutex = wait_seconds, threading.Lock()
        self._read_bytes, self._inode, self._account = 0, 0, Account()

    def spend(self, budget: Budget, paid: Paid) -> Declined | None:
        """Append a payment, durably, if the budget covers its price; else append the refusal, and return it.

        Raises:
            LogInUse, DamagedFile, LooseMode, OSError: nothing may be signed.
        """
        with self._locked() as file:
            account = self._account
            before_sat = paid.price_sat - paid.counted_sat
            problem = budget.problem(paid.host, paid.price_sat, account.sums(paid.host, paid.at), before_sat)
            if problem is not None:
                self._append(file, declination(problem, paid.at, paid.host, paid.method, paid.url, paid.price_sat))
                return problem
            self._append(file, paid)
            return None

    def note(self, line: Line) -> None:
        """Append a line that follows from an answer, durably: so only the last line of the log can be torn."""
        with self._locked() as file:
            self._append(file, line)

    def account(self) -> Account:
        """Read the lines that other processes appended, and return the sums. Do not change them."""
        with self._locked():
            return self._account

    def lines(self) -> Iterator[Line]:
        """Read all lines again, the oldest first."""
        with self._locked():
            raw = self.path.read_bytes()
        return (line for line, _ in _parsed(raw, self.path))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock; the account has all lines, and a torn last line is cut off."""
        with self._mutex:
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o600)
            try:
                check_mode(self.path, os.fstat(descriptor))
                self._wait_for(descriptor)
                if is_new:
                    sync_directory(self.path.parent)
                self._catch_up(descriptor)
                yield descriptor
            finally:
                os.close(descriptor)

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
        for line, end in _parsed(raw, self.path):
            self._account.add(line)
            whole = end
        self._read_bytes += whole
        if whole < len(raw):
            os.ftruncate(descriptor, self._read_bytes)
            os.fsync(descriptor)

    def _append(self, descriptor: int, line: Line) -> None:
        raw = _encoded(line)
        written = os.write(descriptor, raw)
        if written != len(raw):
            os.ftruncate(descriptor, self._read_bytes)
            msg = f"{self.path}: wrote {written} of {len(raw)} bytes"
            raise OSError(msg)
        os.fsync(descriptor)
        self._account.add(line)
        self._read_bytes += written


def declination(error: Declined, at: int, host: str, method: str, url: str, price_sat: int) -> Declination:
    """Return the line of a payment that was not made."""
    return Declination(at, host, method, shortened(url), price_sat, error.code, shortened(str(error)))


def shortened(text: str) -> str:
    """Cut a text that others chose, so that no line grows without bound."""
    return text[:_MOST_TEXT]


def _encoded(line: Line) -> bytes:
    raw = _ENCODER.encode(line)
    return b"%s %08x\n" % (raw, zlib.crc32(raw))


def _parsed(raw: bytes, path: Path) -> Iterator[tuple[Line, int]]:
    """Read lines; give each with the offset of its end. A last line that is not whole ends the reading.

    Raises:
        DamagedFile: another line is not whole.
    """
    start = 0
    while start < len(raw):
        stop = raw.find(b"\n", start)
        found = None if stop < 0 else _line(raw[start:stop])
        if found is None:
            if 0 <= stop < len(raw) - 1:
                raise DamagedFile(path=path, reason=f"the line at byte {start} does not fit its checksum")
            return
        yield found, stop + 1
        start = stop + 1


def _line(raw: bytes) -> Line | None:
    content, _, checksum = raw.rpartition(b" ")
    if checksum != b"%08x" % zlib.crc32(content):
        return None
    try:
        return _DECODER.decode(content)
    except msgspec.MsgspecError:
        return None
