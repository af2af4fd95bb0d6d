"""The thread pool of the event loop: bounded, never waited for, and results go back to the caller."""

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
    pool = ThreadPool(2, "test")
    begun = threading.Event()
    for _ in range(3):
        pool.submit(lambda: (begun.set(), threading.Event().wait(1000)), print)
    begun.wait()

asyncio.run(main())
"""


async def test_results_go_back_to_the_caller() -> None:
    """Each caller gets the result or exception of its own work."""
    threads = ThreadPool(4, "test")

    results = await asyncio.gather(
        *(threads.run(lambda number=number: 12 // number) for number in range(4)), return_exceptions=True
    )

    assert results[1:] == [12, 6, 4]
    assert isinstance(results[0], ZeroDivisionError)


async def test_no_more_threads_than_allowed_and_no_more_than_needed() -> None:
    """Sequential work uses one thread; concurrent work uses at most the allowed number of threads."""
    threads, names = ThreadPool(3, "test"), set[str]()

    def work() -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.01)

    for _ in range(3):
        await threads.run(work)
    assert names == {"test 1"}

    await asyncio.gather(*(threads.run(work) for _ in range(30)))
    assert names == {"test 1", "test 2", "test 3"}


async def test_done_runs_in_the_thread_of_the_loop() -> None:
    """`done` may use objects of the loop."""
    threads, where = ThreadPool(2, "test"), asyncio.get_running_loop().create_future()

    threads.submit(lambda: None, lambda _: where.set_result(threading.current_thread()))

    assert await where is threading.current_thread()


async def test_cancelled_work_is_not_begun() -> None:
    """Cancelled work is skipped, and the next work is done."""
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


def test_hanging_threads_do_not_delay_the_end() -> None:
    """A process ends although all threads are in calls that don't return, and more work is queued."""
    assert subprocess.run([sys.executable, "-c", HANGING], check=False, timeout=20, cwd=ROOT).returncode == 0
