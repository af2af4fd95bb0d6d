"""A sink for log lines on a descriptor that may be slow, full or closed: it drops and counts lines, and never blocks.

A stopped pipe reader, a terminal at Ctrl-S and a full disk must not delay or end the work that the log describes. Pipes
and terminals are opened anew: O_NONBLOCK on the inherited descriptor would also affect the processes that share it. A
line that can't be written at once waits, up to a limit, for the next write.
"""

from __future__ import annotations

import io
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

_MOST_BYTES = 1_000_000
"""Most bytes that wait for a slow reader."""

_PIPE_BYTES = 4096
"""Linux pipe(7): a pipe that poll calls writable takes PIPE_BUF bytes without blocking."""


class LogSink(io.TextIOBase):
    """A text file over a descriptor, such as 2; safe for use from all threads."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.lost = 0
        """Lines that were dropped."""
        self._descriptor = descriptor
        self._unsaid = 0
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._lock = threading.RLock()
        self._send = _sender(descriptor)

    encoding = "utf-8"
    errors = "backslashreplace"

    @property
    def failing(self) -> bool:
        """Whether the newest lines are still unwritten."""
        return bool(self._waiting) or self._unsaid > 0

    def write(self, text: str) -> int:
        """Accept text; write it at once if the descriptor allows."""
        data = text.encode("utf8", "backslashreplace")
        with self._lock:
            if self._bytes + len(data) > _MOST_BYTES:
                self._lose(data)
            else:
                self._waiting.append(data)
                self._bytes += len(data)
            self._run_queue()
        return len(text)

    def flush(self) -> None:
        """Write the waiting lines if the descriptor allows."""
        with self._lock:
            self._run_queue()

    def drain(self, seconds: float = 1.0) -> None:
        """Give a slow reader up to this many seconds to take the waiting lines; called at the end of the process."""
        end = time.monotonic() + seconds
        while self._waiting and time.monotonic() < end:
            self.flush()
            time.sleep(0.01)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False

    def fileno(self) -> int:
        return self._descriptor

    def _run_queue(self) -> None:
        while self._waiting:
            data = self._waiting.popleft()
            self._bytes -= len(data)
            try:
                sent = self._send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._lose(data)
                continue
            if sent < len(data):
                self._waiting.appendleft(data[sent:])
                self._bytes += len(data) - sent
            if not sent:
                return
            if self._unsaid and not self._waiting:
                self._waiting.append(self._report())

    def _lose(self, data: bytes) -> None:
        lines = data.count(b"\n")
        self.lost += lines
        self._unsaid += lines

    def _report(self) -> bytes:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        line = f'timestamp={now} level=error event="log lines lost" lines={self._unsaid}\n'.encode()
        self._unsaid = 0
        self._bytes += len(line)
        return line


def open_missing_descriptors() -> None:
    """Open /dev/null in place of a closed 0, 1 or 2: otherwise the next file to be opened would become the log."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _sender(descriptor: int) -> Callable[[bytes], int]:
    """Return a function that writes without blocking; it returns the bytes written, or raises `OSError`."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return lambda data: os.write(descriptor, data)
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=os.dup(descriptor))
        return lambda data: connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
        except OSError:  # a terminal of another user, or a pipe without a reader
            return lambda data: _write_if_ready(descriptor, data)
        return lambda data: os.write(own, data)
    return lambda data: os.write(descriptor, data)


def _write_if_ready(descriptor: int, data: bytes) -> int:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(descriptor, data[:_PIPE_BYTES])
