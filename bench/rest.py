"""REST clients that use almost no CPU: they send requests that were built before the clock starts, in one loop.

They run in a process of their own, on another core than the server. Of an answer they read only status and end; any
status but the expected one, usually 2xx, ends the run with its reason. They use no event loop: a slow client would be the bottleneck, or would let
the server look idle.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection as Pipe

from session import BenchError, Funded, Server, Session, exchange, generate, stop

_END = b"}\n"
"""Every answer's body ends with these bytes, and they occur nowhere else in it."""

CONNECTION_EACH = "connection-each"


class Client:
    """Sends its requests in order, each after the answer to the one before."""

    def __init__(self, server: Server, mode: str, answers: bytes = b"HTTP/1.1 2") -> None:
        self._server, self._answers = server, answers
        self._requests: Iterator[bytes] = iter(())
        self._each = mode == CONNECTION_EACH
        self._answer = b""
        self.connection = self._connect()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection((self._server.host, self._server.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def begin(self, requests: Sequence[bytes]) -> bool:
        """Send the first of these requests, if there is one."""
        self._requests = iter(requests)
        return self.send()

    def send(self) -> bool:
        """Send the next request, if there is one."""
        request = next(self._requests, None)
        if request is None:
            return False
        self._sent_ns = time.monotonic_ns()
        if self._each:
            old, self.connection = self.connection, self._connect()
            old.close()
        self.connection.sendall(request)
        return True

    def take(self) -> int | None:
        """Read arrived bytes; return the latency in ns once the answer is complete."""
        came = self.connection.recv(65536)
        answer = self._answer + came if self._answer else came
        if not came:
            stop("the server closed the connection")
        if not answer.endswith(_END):
            self._answer = answer
            return None
        self._answer = b""
        if not answer.startswith(self._answers):
            stop(answer.partition(b"\r\n")[0].decode("latin1"))
        return time.monotonic_ns() - self._sent_ns


def pay(clients: Sequence[Client], shares: Sequence[Sequence[bytes]]) -> array[int]:
    """Let clients send their requests together; return all latencies, in ns."""
    poll, paying, latencies = select.epoll(), dict[int, Client](), array("q")

    def watch(client: Client) -> None:
        paying[client.connection.fileno()] = client
        poll.register(client.connection, select.EPOLLIN)

    for client, requests in zip(clients, shares, strict=True):
        if client.begin(requests):
            watch(client)
    while paying:
        for number, _ in poll.poll():
            client = paying[number]
            latency = client.take()
            if latency is None:
                continue
            latencies.append(latency)
            goes_on = client.send()
            if goes_on and client.connection.fileno() == number:
                continue
            del paying[number]
            if goes_on:
                watch(client)
            else:
                poll.unregister(number)
    poll.close()
    return latencies


PARTS = 10
"""Number of parts of a run; R is measured between them."""


def share(whole: Sequence[bytes], part: int) -> Sequence[bytes]:
    """Select the requests of one part."""
    begin, end = (len(whole) * number // PARTS for number in (part, part + 1))
    return whole[begin:end]


def opened(server: Server, session: Session) -> Session:
    """Open a session's channel."""
    with socket.create_connection((server.host, server.port)) as connection:
        exchange(connection, session.opening)
    return session


def generator(
    server: Server, channels: list[Funded], count: int, version: int, mode: str, core: int, pipe: Pipe
) -> None:
    """Run the clients of a load, one channel and one connection each; the body of a process.

    Reports "ready"; pays a part on each command, and reports its latencies (ns).
    """
    os.sched_setaffinity(0, {core})
    try:
        sessions = [opened(server, generate(server, funded, count, version)) for funded in channels]
        clients = [Client(server, mode) for _ in sessions]
        pipe.send("ready")
        for part in range(PARTS):
            pipe.recv()
            pipe.send(pay(clients, [share(session.payments, part) for session in sessions]))
    except (BenchError, OSError) as error:
        pipe.send(BenchError(str(error)))


def hear(pipe: Pipe) -> object:
    """Wait for the generator's next report.

    Raises:
        BenchError: the generator failed or died.
    """
    try:
        report = pipe.recv()
    except EOFError:
        stop("the generator died")
    if isinstance(report, BenchError):
        raise report
    return report
