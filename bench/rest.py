"""REST clients that cost next to nothing: requests are bytes made before the clock starts, and one loop sends them all.

They run in a process of their own, on another core than the server. An answer is read as far as its status and its end;
any but 2xx ends the run with its reason.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection as Pipe

import uvloop
from session import BenchError, Funded, Server, Session, generate, stop

_END = b"}\n"
"""How the body of each answer ends, and nothing before it does."""


class Payer(asyncio.Protocol):
    """Sends its requests one after the other over one connection, each after the answer to the one before."""

    def __init__(self, requests: Iterable[bytes], latencies: array[int]) -> None:
        self._requests, self._latencies = iter(requests), latencies
        self._answer = b""
        self._sent_ns = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(BenchError(f"the server closed the connection: {exc}"))

    def send(self) -> None:
        """Send the next request, if there is one."""
        request = next(self._requests, None)
        if request is None:
            self.done.set_result(None)
            return
        self._sent_ns = time.monotonic_ns()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        answer = self._answer + data if self._answer else data
        if not answer.endswith(_END):
            self._answer = answer
            return
        self._answer = b""
        self._latencies.append(time.monotonic_ns() - self._sent_ns)
        if not answer.startswith(b"HTTP/1.1 2"):
            self.done.set_exception(BenchError(answer.partition(b"\r\n")[0].decode("latin1")))
            return
        self.send()

    def close(self) -> None:
        self._transport.close()


async def connect(server: Server, requests: Iterable[bytes], latencies: array[int]) -> Payer:
    """Open a connection for requests."""
    loop = asyncio.get_running_loop()
    _, payer = await loop.create_connection(lambda: Payer(requests, latencies), server.host, server.port)
    return payer


async def send_all(server: Server, requests: Iterable[bytes], latencies: array[int]) -> None:
    """Send requests over one connection."""
    payer = await connect(server, requests, latencies)
    payer.send()
    await payer.done
    payer.close()


async def send_each(server: Server, requests: Iterable[bytes], latencies: array[int]) -> None:
    """Send every request over a connection of its own; a latency includes opening it."""
    for request in requests:
        begun = time.monotonic_ns()
        payer = await connect(server, [request], array("q"))
        payer.send()
        await payer.done
        latencies.append(time.monotonic_ns() - begun)
        payer.close()


PARTS = 10
"""A run is paid in so many parts; between them R is measured."""

MODES = {"keep-alive": send_all, "connection-each": send_each}


async def _pay(server: Server, sessions: list[Session], mode: str, pipe: Pipe) -> None:
    """Open all channels, report "ready"; pay a part together when told to, and report its latencies (ns)."""
    unused = array("q")
    for session in sessions:
        await send_all(server, [session.opening], unused)
    pipe.send("ready")
    for part in range(PARTS):
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        latencies = array("q")
        await asyncio.gather(*(MODES[mode](server, share(session.payments, part), latencies) for session in sessions))
        pipe.send(latencies)


def share(whole: Sequence[bytes], part: int) -> Sequence[bytes]:
    """Cut out what is sent in a part."""
    begin, end = (len(whole) * number // PARTS for number in (part, part + 1))
    return whole[begin:end]


def generator(
    server: Server, channels: list[Funded], count: int, version: int, mode: str, core: int, pipe: Pipe
) -> None:
    """Be the clients of a run, one channel and one connection each; the body of a process."""
    os.sched_setaffinity(0, {core})
    try:
        sessions = [generate(server, funded, count, version) for funded in channels]
        uvloop.run(_pay(server, sessions, mode, pipe))
    except (BenchError, OSError) as error:
        pipe.send(BenchError(str(error)))


def hear(pipe: Pipe) -> object:
    """Wait for the generator's next report.

    Raises:
        BenchError: it failed or died.
    """
    try:
        told = pipe.recv()
    except EOFError:
        stop("the generator died")
    if isinstance(told, BenchError):
        raise told
    return told
