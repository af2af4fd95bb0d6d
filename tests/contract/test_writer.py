"""The store's writer thread."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from paychan.store.leveldb.writer import WriterThread


async def test_shutdown_that_the_thread_sees_before_its_wakeup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that finishes its work at the very moment of `shutdown` ends normally; a second call only waits."""
    writer, begun = WriterThread("test"), threading.Event()

    def until_closed() -> None:
        begun.set()
        while not writer._closed:
            time.sleep(0.001)

    work = asyncio.ensure_future(writer.run(until_closed))
    await asyncio.sleep(0)
    begun.wait()
    ring = os.eventfd_write

    def late(descriptor: int, value: int) -> None:
        time.sleep(0.1)  # the thread has ended by now
        ring(descriptor, value)

    monkeypatch.setattr(os, "eventfd_write", late)
    writer.shutdown()
    writer.shutdown()

    await work
    with pytest.raises(RuntimeError, match="shut down"):
        await writer.run(time.time)
