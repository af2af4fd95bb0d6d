"""Threads that work for the event loop: bounded, never waited for, and whoever asked is told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from signer.server.thread_pool import ThreadPool

ROOT = Path(__file__).parents[2]

HANGING = """
import asyncio, threading
from signer.server.thread_pool import ThreadPool

async def main():
    crew = ThreadPool(2, "test")
    begun = threading.Event()
    for _ in range(3):
        crew.submit(lambda: (begun.set(), threading.Event().wait(1000)), print)
    begun.wait()

asyncio.run(main())
"""


async def test_what_was_done_is_handed_back() -> None:
    """Each gets what its own work returned or raised."""
    threads = ThreadPool(4, "test")

    results = await asyncio.gather(
        *(threads.run(lambda number=number: 12 // number) for number in range(4)), return_exceptions=True
    )

    assert results[1:] == [12, 6, 4]
    assert isinstance(results[0], ZeroDivisionError)


async def test_no_more_threads_than_allowed_and_no_more_than_needed() -> None:
    """Work that follows other work is done by the same thread; however much comes at once, the threads are as many as allowed."""
    threads, names = ThreadPool(3, "test"), set[str]()

    def work() -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.01)

    for _ in range(3):
        await threads.run(work)
    assert names == {"test 1"}

    await asyncio.gather(*(threads.run(work) for _ in range(30)))
    assert names == {"test 1", "test 2", "test 3"}


async def test_what_is_done_on_the_loop_is_done_by_its_thread() -> None:
    """`done` may touch what belongs to the loop."""
    threads, where = ThreadPool(2, "test"), asyncio.get_running_loop().create_future()

    threads.submit(lambda: None, lambda _: where.set_result(threading.current_thread()))

    assert await where is threading.current_thread()


async def test_what_nobody_waits_for_is_not_begun() -> None:
    """Work whose asker has gone is left out, and the next is done."""
    threads, go_on, done = ThreadPool(1, "test"), threading.Event(), list[int]()
    first = asyncio.create_task(threads.run(lambda: go_on.wait(20)))
    second = asyncio.create_task(threads.run(lambda: done.append(2)))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second

    go_on.set()

    assert await first
    await threads.run(lambda: done.append(3))
    assert done == [3]


def test_a_thread_that_hangs_does_not_hold_up_the_end() -> None:
    """A process ends although all threads are in calls that don't return, and more work waits for them."""
    assert subprocess.run([sys.executable, "-c", HANGING], check=False, timeout=20, cwd=ROOT).returncode == 0
