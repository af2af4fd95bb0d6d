"""Crowds of connections to a signer, and measurements of the resources that they make it use."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self


@contextmanager
def many_files(number: int) -> Iterator[None]:
    """Allow this process this number of open files, until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, max(number, hard)))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, max(hard, number) if soft < number else hard))


class Crowd:
    """Opens connections as fast as they are accepted, and keeps the newest `size` of them open, until the block ends.

    Each sends the next one of `messages`, reads nothing, and stays open on this side, whatever the signer does.
    """

    def __init__(self, path: Path, size: int, messages: Sequence[bytes]) -> None:
        self._path = path
        self._size = size
        self._messages = messages
        self._connections: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.opened = 0

    def _run(self) -> None:
        while not self._stop.is_set():
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(0.1)
            try:
                connection.connect(str(self._path))
            except (BlockingIOError, TimeoutError):
                connection.close()
                self._stop.wait(0.002)
                continue
            self._send(connection, self._messages[self.opened % len(self._messages)])
            self.opened += 1
            self._connections.append(connection)
            if len(self._connections) > self._size:
                self._connections.pop(0).close()

    def _send(self, connection: socket.socket, message: bytes) -> None:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while message:
                message = message[connection.send(message) :]

    def wait_for(self, number: int) -> None:
        """Wait until this number of connections was opened."""
        until(lambda: self.opened >= number)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """Wait for a condition that must become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def memory_bytes(pid: int, name: str = "VmRSS") -> int:
    """Memory that a process uses, or its highest use (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def is_over(connection: socket.socket) -> bool:
    """Whether the signer has ended the connection; reads nothing."""
    events = select.poll()
    events.register(connection, select.POLLRDHUP | select.POLLHUP)
    return bool(events.poll(0))
