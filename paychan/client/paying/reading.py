"""Read an answer that is paid by units: pay where the server waits, blocking or on an event loop.

A price by the second comes due while a read waits, so a thread (or a task) pays in that time; it pays for no time in which
the program does not read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

from paychan.client.errors import ClientError
from paychan.client.paying.metering import Need
from paychan.client.paying.streams import Stream


def pieces(stream: Stream, chunks: Iterator[bytes], pay: Callable[[], None]) -> Iterator[bytes]:
    """Yield the body without the events about the payment, and pay while it is read.

    Args:
        stream: the sums paid and the units counted.
        chunks: the body as it arrives.
        pay: pays the next step (`top_up`).

    Raises:
        BodyUnpaid: a step could not be paid; the body ends.
    """
    timer = _Timer(stream, pay) if stream.seconds_left is not None else None
    try:
        while True:
            while stream.must_pay:
                pay() if timer is None else timer.pay()
            if timer is not None:
                timer.reading.set()
            chunk = next(chunks, None)
            if timer is not None:
                timer.check()
            if chunk is None:
                break
            for part in stream.feed(chunk):
                if isinstance(part, Need):
                    pay()
                else:
                    yield part
    finally:
        if timer is not None:
            timer.stop()
    if rest := stream.end():
        yield rest


class _Timer:
    """Pays for seconds while a read waits, on a thread of its own."""

    def __init__(self, stream: Stream, pay: Callable[[], None]) -> None:
        self._stream, self._pay, self._lock = stream, pay, threading.Lock()
        self.reading, self._ended = threading.Event(), threading.Event()
        self._error: ClientError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pay(self) -> None:
        with self._lock:
            self.check()
            if self._stream.must_pay:
                self._pay()

    def check(self) -> None:
        """Note that no read waits now. Raises the error of a payment."""
        self.reading.clear()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._ended.set()
        self.reading.set()
        self._thread.join()

    def _run(self) -> None:
        while self.reading.wait() and not self._ended.wait(self._stream.seconds_left):
            with self._lock:
                if not (self.reading.is_set() and self._stream.must_pay):
                    continue
                try:
                    self._pay()
                except ClientError as error:
                    self._error = error
                    return


async def pieces_async(
    stream: Stream, chunks: AsyncIterator[bytes], pay: Callable[[], Awaitable[None]]
) -> AsyncGenerator[bytes, None]:
    """Do what `pieces` does, on the event loop."""
    while True:
        while stream.must_pay:
            await pay()
        chunk = await _next(stream, chunks, pay)
        if chunk is None:
            break
        for part in stream.feed(chunk):
            if isinstance(part, Need):
                await pay()
            else:
                yield part
    if rest := await asyncio.to_thread(stream.end):
        yield rest


async def _next(stream: Stream, chunks: AsyncIterator[bytes], pay: Callable[[], Awaitable[None]]) -> bytes | None:
    """Return the next chunk, and pay for the seconds of the wait; None at the end."""
    if stream.seconds_left is None:
        return await anext(chunks, None)
    reading = asyncio.ensure_future(_chunk(chunks))
    try:
        while not reading.done():
            await asyncio.wait([reading], timeout=stream.seconds_left)
            if not reading.done() and stream.must_pay:
                await pay()
        return reading.result()
    finally:
        if not reading.done():
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading


async def _chunk(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)
