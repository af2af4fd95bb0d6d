"""Memory left below the process's limit: new work is refused before memory runs out.

Limits are RLIMIT_AS, RLIMIT_DATA and the control group's; without a limit nothing is refused. `RESERVE_BYTES` stay free
for needs that are not checked one by one: the store's buffers (two of 32 MB, filled slowly), settlements, the operator,
and requests in progress. Below it no connection, channel or address is added, and no payment wakes a passivated
channel. Below `LEAST_BYTES` payments are refused, too. Closing and settling continue.

A process returns freed memory to its own allocator, not to the system. So half of the difference between the peak and
the present use of connections and channels counts as left.

With less than `START_BYTES` left the server refuses to start: it could serve no request.

If memory runs out all the same, the process exits at once with a status: the state on disk is the truth, and a process
that lost an allocation at an unknown point can't be trusted.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from paychan.protocol.errors import MemoryLow

RESERVE_BYTES = 48 << 20
LEAST_BYTES = 16 << 20

SERVE_BYTES = (64 << 20) + RESERVE_BYTES
"""Left when the server begins to listen: the store's buffers fill up later, and still no request is refused."""
START_BYTES = (32 << 20) + SERVE_BYTES
"""Left at start. Until it serves, a server takes 1 to 25 MB, most of it for the stacks of ZeroMQ's threads."""

CONNECTION_BYTES = 12_000
"""An idle connection on the fast path. A busy one takes at most 160 kB: head, body, replies, fallback buffers."""
CHANNEL_BYTES = 12_000
"""An active channel with its record in the store's memory."""

_FRESH_SECONDS = 0.02
_M_ARENA_MAX = -8
"""glibc's mallopt(3)."""
_STACK_BYTES = 1 << 20
_PAGE_BYTES = resource.getpagesize()
_EXIT_BROKEN = 3


class TooLittleMemory(Exception):
    """The memory limits leave too little to serve; the message has both numbers."""


def prepare_for_limit() -> None:
    """Use little address space where a limit counts it; call this before the process starts its threads.

    By default a thread reserves 8 MB for its stack, and glibc up to 128 MB for each thread's allocations: 450 MB
    instead of 95 MB when the server starts.
    """
    if any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    ):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
        threading.stack_size(_STACK_BYTES)


class Memory:
    """Bytes left below the memory limits; a reading is reused for 20 ms."""

    def __init__(self, taken: Callable[[], int] = lambda: 0) -> None:
        """`taken` estimates the bytes that connections and channels use now."""
        self.taken = taken
        self._peak = 0
        self._left = float("inf")
        self._read_at = float("-inf")
        self._statm = (
            os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC) if Path("/proc/self/statm").exists() else -1
        )
        self._group = group_limit()

    def close(self) -> None:
        """Close the file that this object reads."""
        if self._statm >= 0:
            os.close(self._statm)
            self._statm = -1

    @property
    def is_limited(self) -> bool:
        """Whether the process has a memory limit."""
        return self._statm >= 0 and (
            self._group is not None
            or any(
                resource.getrlimit(kind)[0] != resource.RLIM_INFINITY
                for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
            )
        )

    def left(self) -> float:
        """Return the bytes left; infinite without a limit."""
        now = monotonic()
        if now - self._read_at > _FRESH_SECONDS:
            self._read_at, self._left = now, self._measure()
        return self._left

    def check(self, need_bytes: int) -> None:
        """Refuse to start with less than `need_bytes` left. Raises `TooLittleMemory`."""
        left = self._measure()
        if left < need_bytes:
            msg = (
                f"memory: {int(left) >> 20} MB are left below the limit, want {need_bytes >> 20} MB or more: raise "
                "RLIMIT_AS (LimitAS=), RLIMIT_DATA (LimitDATA=) or memory.max (MemoryMax=)"
            )
            raise TooLittleMemory(msg)

    def new_work(self) -> MemoryLow | None:
        """Return the reason to refuse new connections, channels and addresses now, or None."""
        return MemoryLow(left_bytes=int(self._left), need_bytes=RESERVE_BYTES) if self.left() < RESERVE_BYTES else None

    def any_work(self) -> MemoryLow | None:
        """Return the reason to refuse even a payment on an active channel now, or None."""
        return MemoryLow(left_bytes=int(self._left), need_bytes=LEAST_BYTES) if self.left() < LEAST_BYTES else None

    def _measure(self) -> float:
        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        if self._statm < 0 or (self._group is None and all(limit == resource.RLIM_INFINITY for limit in limits)):
            return float("inf")
        fields = [int(field) * _PAGE_BYTES for field in os.pread(self._statm, 256, 0).split()]
        used = [fields[0], fields[5], fields[1]]  # address space, data, resident
        left = min(
            limit - use
            for limit, use in zip([*limits, self._group], used, strict=True)
            if limit is not None and limit != resource.RLIM_INFINITY
        )
        taken = self.taken()
        self._peak = max(self._peak, taken)
        return left + (self._peak - taken) // 2


def group_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the smallest memory.max of this process's control groups (version 2); None: no group has one."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    where = next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    if where is None:
        return None
    found = list(_limits(root, where))
    return min(found) if found else None


def _limits(root: Path, where: str) -> Iterator[int]:
    here = root / where
    while True:
        try:
            text = (here / "memory.max").read_text().strip()
        except OSError:
            text = ""
        if text.isdigit():
            yield int(text)
        if here in (root, here.parent):
            return
        here = here.parent


def is_memory_error(error: BaseException | None) -> bool:
    """Return whether an exception or one of its causes is a lack of memory; a thread that can't start counts as one."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, MemoryError) or "can't start new thread" in str(error)[:80]:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def end_if_out_of_memory(error: BaseException | None) -> None:
    """Exit at once, with as few allocations as possible, if the exception is a lack of memory."""
    if is_memory_error(error):
        os.write(2, b'level=critical event="out of memory, stopping at once"\n')
        os._exit(_EXIT_BROKEN)


def end_when_memory_ends(loop: asyncio.AbstractEventLoop) -> None:
    """Check every unhandled exception for a lack of memory: on the loop, in threads, in finalizers."""

    def unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        end_if_out_of_memory(context.get("exception"))
        loop.default_exception_handler(context)

    def unraisable(arguments: Any) -> None:
        end_if_out_of_memory(arguments.exc_value)
        sys.__unraisablehook__(arguments)

    def in_thread(arguments: Any) -> None:
        end_if_out_of_memory(arguments.exc_value)
        threading.__excepthook__(arguments)

    loop.set_exception_handler(unhandled)
    sys.unraisablehook, threading.excepthook = unraisable, in_thread


def end_when_logged(_logger: Any, _name: str, event: Any) -> Any:
    """Exit if a logged exception is a lack of memory (a structlog processor): code that logs need not check for it."""
    logged = event.get("exc_info")
    if logged:
        found = logged if isinstance(logged, BaseException) else logged[1] if isinstance(logged, tuple) else None
        if found is None:
            found = sys.exc_info()[1]
        end_if_out_of_memory(found)
    return event
