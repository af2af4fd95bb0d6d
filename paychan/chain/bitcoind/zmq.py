"""Bitcoin Core's ZMQ notifications, used only to wake up early: their content is not trusted, and all may be missed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

try:
    import zmq
    import zmq.asyncio
except ModuleNotFoundError:  # an installation for payers: the node is polled instead
    HAS_ZMQ = False
else:
    HAS_ZMQ = True

from paychan.supervisor import Supervised, Supervisor

_TOPICS = (b"hashblock", b"sequence")
_MEMPOOL_LABELS = (b"A", b"R")
"""doc/zmq.md: the sequence topic reports transactions that were added to the mempool or removed from it,
and of blocks that were connected (C) or disconnected (D)."""


class ZmqFeed:
    """A subscription to some of the node's publishers. libzmq reconnects by itself when the node returns."""

    def __init__(self, addresses: Iterable[str], supervisor: Supervisor) -> None:
        self.addresses = set(addresses)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        for topic in _TOPICS:
            self._socket.subscribe(topic)
        for address in self.addresses:
            self._socket.connect(address)
        self._block = asyncio.Event()
        self._mempool_changed = False
        self._task = supervisor.run("zmq feed", self._receive)

    async def wait(self, timeout_seconds: float) -> bool:
        """Wait for a block, at most this many seconds; return whether anything was published since the last call.

        A main network mempool changes ten times a second: its changes are collected and do not end the wait early.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):  # Python 3.11's wait_for may swallow a cancellation
                await self._block.wait()
        published = self._block.is_set() or self._mempool_changed
        self._block.clear()
        self._mempool_changed = False
        return published

    async def close(self) -> None:
        await self._task.stop()
        self._context.destroy(linger=0)

    async def _receive(self, task: Supervised) -> None:
        while True:
            topic, body, *_ = await self._socket.recv_multipart()
            task.succeeded()
            if topic == b"sequence" and body[32:33] in _MEMPOOL_LABELS:
                self._mempool_changed = True
            else:
                self._block.set()


def reachable(address: str, host: str) -> str | None:
    """Convert the address at which a node publishes into one to connect to, given the host of its RPC interface.

    None if the node publishes on its own loopback interface and is not on this machine.
    """
    published = urlsplit(address)
    if published.scheme == "ipc":
        return address if _local(host) else None
    if published.hostname in ("0.0.0.0", "::", "*"):
        return f"tcp://{f'[{host}]' if ':' in host else host}:{published.port}"
    return address if _local(host) or not _local(published.hostname or "") else None


def _local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
