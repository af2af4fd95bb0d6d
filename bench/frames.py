"""Clients of the payment stream that use almost no CPU: they send frames that were built before the clock starts.

They run in a process of their own, on another core than the server. Of an answer they read only whether it is a
success; any other answer ends the run.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from base64 import b64encode
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection as Pipe

import rest
import uvloop
from session import OPENING_SAT, BenchError, Funded, Server, session_v2

from paychan.protocol.payment import sign_payment
from paychan.protocol.types import Sat
from paychan.protocol.wire.payment_frames import write_payments

_MASK = b"\x5a\xa5\x3c\xc3"
_ANSWER_BYTES = 17


class Stream(asyncio.Protocol):
    """Keeps a fixed number of frames in flight over one stream until all given frames are answered."""

    _frames: Iterator[bytes]
    _latencies: array[int]

    def __init__(self, each: int, in_flight: int) -> None:
        self._each, self._in_flight = each, in_flight
        self._sent: deque[int] = deque()
        self._came, self._answered = b"", 0
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server closed the connection: {exc or self._came[:100]!r}")

    def upgrade(self, target: str, server: Server) -> None:
        """Request the stream; `ready` is set once it is open."""
        key = b64encode(os.urandom(16)).decode()
        self._transport.write(
            f"GET {target} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )

    def start(self, frames: Sequence[bytes], latencies: array[int]) -> None:
        """Send these frames; `done` is set once all are answered."""
        self._frames, self._latencies = iter(frames), latencies
        self.done = asyncio.get_running_loop().create_future()
        self._send(self._in_flight)

    def _send(self, count: int) -> None:
        """Send the next frames in one write, like a client with several payments to make."""
        frames = [frame for _, frame in zip(range(count), self._frames, strict=False)]
        if frames:
            self._sent.extend([time.monotonic_ns()] * len(frames))
            self._transport.write(b"".join(frames))
        elif not self._sent and not self.done.done():
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._came += data
        if not self.ready.done():
            head, found, self._came = self._came.partition(b"\r\n\r\n")
            if not found:
                self._came = head
            elif head.startswith(b"HTTP/1.1 101"):
                self.ready.set_result(None)
            else:
                self._fail(head.partition(b"\r\n")[0].decode("latin1"))
            return
        finished = 0
        while (frame := self._next_frame()) is not None:
            count, rest_bytes = divmod(len(frame) - 1, _ANSWER_BYTES)
            if rest_bytes or frame[1::_ANSWER_BYTES].count(0) != count:
                self._fail(f"an answer that is no success: {frame[:120]!r}")
                return
            self._answered += count
        now = time.monotonic_ns()
        while self._answered >= self._each and self._sent:
            self._answered -= self._each
            self._latencies.extend([now - self._sent.popleft()] * self._each)
            finished += 1
        if finished:
            self._send(finished)

    def _next_frame(self) -> bytes | None:
        """Cut off the next frame; a server's frame has no mask."""
        came = self._came
        if len(came) < 4:
            return None
        size, start = came[1], 2
        if size == 126:
            size, start = int.from_bytes(came[2:4]), 4
        if len(came) < start + size:
            return None
        self._came = came[start + size :]
        if came[0] == 0x89:  # a ping
            self._transport.write(b"\x8a" + bytes([0x80 | size]) + bytes(4) + came[start : start + size])
            return self._next_frame()
        return came[start : start + size]

    def _fail(self, reason: str) -> None:
        for future in (self.ready, self.done):
            if not future.done():
                future.set_exception(BenchError(reason))


def frame(payload: bytes) -> bytes:
    """Build a masked binary frame, as clients send it."""
    size = len(payload)
    head = bytes([0x82, 0x80 | size]) if size < 126 else b"\x82\xfe" + size.to_bytes(2)
    mask = (_MASK * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload) ^ int.from_bytes(mask)).to_bytes(size)
    return head + _MASK + masked


async def _pay(server: Server, channels: list[Funded], count: int, each: int, in_flight: int, pipe: Pipe) -> None:
    """Open all channels and streams, report "ready"; on each command pay a part together, and report latencies (ns)."""
    loop, streams = asyncio.get_running_loop(), []
    for funded in channels:
        terms, script = funded.terms, funded.terms.funding_script
        payments = [
            sign_payment(
                funded.key, terms, funded.outpoint, funded.value_sat, script, Sat(funded.value_sat - OPENING_SAT - paid)
            )
            for paid in range(count + 1)
        ]
        session = session_v2(server, payments[:2], terms, funded.outpoint)
        rest.opened(server, session)
        frames = [frame(write_payments(payments[at : at + each])) for at in range(1, count + 1, each)]
        _, stream = await loop.create_connection(lambda: Stream(each, in_flight), server.host, server.port)
        target = session.opening.split(b" ", 2)[1].decode().replace("?", "/stream?")
        stream.upgrade(target, server)
        await stream.ready
        streams.append((stream, frames))
    pipe.send("ready")
    for part in range(rest.PARTS):
        await loop.run_in_executor(None, pipe.recv)
        latencies = array("q")
        for stream, frames in streams:
            stream.start(rest.share(frames, part), latencies)
        await asyncio.gather(*(stream.done for stream, _ in streams))
        pipe.send(latencies)


def generator(
    server: Server, channels: list[Funded], count: int, each: int, in_flight: int, core: int, pipe: Pipe
) -> None:
    """Run the clients of a load, one channel and one stream each; the body of a process."""
    os.sched_setaffinity(0, {core})
    try:
        uvloop.run(_pay(server, channels, count, each, in_flight, pipe))
    except (BenchError, OSError) as error:
        pipe.send(BenchError(str(error)))
