"""An honest payer beside an attack: it pays every 5 ms on one connection, and every tenth time over a new one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from types import TracebackType
from typing import Any, Self

from funding import from_nothing
from msgspec import Struct
from serve import cores
from session import BenchError, Server, exchange, generate

_PAYMENTS = 6000
_EVERY_SECONDS = 0.005
_PATIENCE_SECONDS = 2.0
_WINDOW_SECONDS = 0.5


class Latencies(Struct):
    """The payer's measurements: seconds of each payment, and the number of failed ones."""

    latencies: list[float]
    failures: int


class Honest:
    """The payer, in a process of its own."""

    def __init__(self, server: Server) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, other = fork.Pipe()
        self._process = fork.Process(target=_live, args=(server, other), daemon=True)
        self._process.start()

    def __enter__(self) -> Self:
        if not self._pipe.poll(60) or self._pipe.recv() != "ready":
            msg = "the honest payer could not open its channel"
            raise BenchError(msg)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()

    def pay(self, seconds: float) -> Latencies:
        """Pay for the given seconds, and return the measurements."""
        self._pipe.send(seconds)
        report: Latencies = self._pipe.recv()
        return report

    def recover(self, most_seconds: float, good_seconds: float) -> float | None:
        """Pay until a short window has no failure and few latencies above the limit; return the seconds until then."""
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < most_seconds:
            seen = self.pay(_WINDOW_SECONDS)
            slow = sum(latency > good_seconds for latency in seen.latencies)
            if not seen.failures and slow <= len(seen.latencies) // 20:
                return round(passed, 1)
        return None


def _live(server: Server, pipe: Any) -> None:
    os.sched_setaffinity(0, {cores()[1]})
    session = generate(server, from_nothing(server, None, 1, 1)[0], _PAYMENTS, 1)
    payments = iter(session.payments)
    kept = _connect(server)
    exchange(kept, session.opening)
    pipe.send("ready")
    while True:
        ends, seen, number = time.monotonic() + pipe.recv(), Latencies([], 0), 0
        while time.monotonic() < ends:
            begun, number = time.monotonic(), number + 1
            try:
                if number % 10:
                    exchange(kept, next(payments))
                else:
                    with _connect(server) as fresh:
                        exchange(fresh, next(payments))
                seen.latencies.append(time.monotonic() - begun)
            except (BenchError, OSError):
                seen.failures += 1
                seen.latencies.append(time.monotonic() - begun)
                kept.close()
                with contextlib.suppress(OSError):
                    kept = _connect(server)
            time.sleep(max(0.0, begun + _EVERY_SECONDS - time.monotonic()))
        pipe.send(seen)


def _connect(server: Server) -> socket.socket:
    connection = socket.create_connection((server.host, server.port), timeout=_PATIENCE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
