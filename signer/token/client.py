"""The signer's side of the connections to its token's process, and the keys that the token has.

There are two connections. The control is used before the event loop runs: the process reports its keys, and makes the
few that are missing; later it closes when the process ends. The line carries signature requests of the event loop, many
at a time: any free thread of the process takes the next one.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import time
from collections import deque
from contextlib import suppress
from itertools import count

from signer import vital
from signer.config import SignerConfig
from signer.keys.ring import KeysFailed
from signer.token.objects import KeyName
from signer.token.process import CLOSING_SECONDS, be_the_process
from signer.token.sessions import TokenError
from signer.token.wire import (
    ENDED,
    MOST_BYTES,
    Failed,
    Keys,
    Make,
    Ready,
    Sign,
    Signed,
    TokenReply,
    decode_reply,
    encode,
    receive,
)


class RemoteKey:
    """A key pair in the token, as the signer sees it."""

    __slots__ = ("_identifier", "_token", "public_key")

    def __init__(self, token: RemoteToken, identifier: bytes, public_key: bytes) -> None:
        self._token = token
        self._identifier = identifier
        self.public_key = public_key

    async def sign(self, digest: bytes) -> bytes:
        """See `ring.SigningKey`. If it is cancelled in time, the token does not sign."""
        return await self._token.line.sign(self._identifier, digest)


class Line:
    """Signature requests of the event loop. A few more than the token signs at a time are sent; others wait here."""

    def __init__(self, wire: socket.socket) -> None:
        wire.setblocking(False)
        self.most_under_way = 1
        self._wire = wire
        self._numbers = count()
        self._under_way: dict[int, asyncio.Future[bytes]] = {}
        self._waiting: deque[tuple[asyncio.Future[bytes], bytes, bytes]] = deque()
        self._is_heard = False

    def sign(self, identifier: bytes, digest: bytes) -> asyncio.Future[bytes]:
        """Have a digest signed by a key. A request that is cancelled before it is sent is dropped."""
        loop = asyncio.get_running_loop()
        if not self._is_heard:
            self._is_heard = True
            loop.add_reader(self._wire, vital.guarded("token", self._hear))
        future: asyncio.Future[bytes] = loop.create_future()
        self._waiting.append((future, identifier, digest))
        self._ask()
        return future

    def _ask(self) -> None:
        while self._waiting and len(self._under_way) < self.most_under_way:
            future, identifier, digest = self._waiting.popleft()
            if future.done():
                continue
            number = next(self._numbers)
            try:
                self._wire.send(encode(Sign(identifier, digest, number)))
            except OSError:
                future.set_exception(KeysFailed(ENDED))
                continue
            self._under_way[number] = future

    def _hear(self) -> None:
        """Process received replies; called by the event loop."""
        with suppress(ConnectionError):  # the process ended with unread requests
            while True:
                try:
                    raw = self._wire.recv(MOST_BYTES)
                except BlockingIOError:
                    self._ask()
                    return
                if not raw:
                    break
                self._take(decode_reply(raw))
        self._end()

    def _end(self) -> None:
        """Fail all requests: the connection is closed. `_ask` fails in the same way from now on."""
        asyncio.get_running_loop().remove_reader(self._wire)
        for future in self._under_way.values():
            _fail(future, KeysFailed(ENDED))
        self._under_way.clear()
        self._ask()

    def _take(self, reply: TokenReply) -> None:
        if isinstance(reply, Signed):
            future = self._under_way.pop(reply.number)
            if not future.done():
                future.set_result(reply.signature)
        elif isinstance(reply, Failed):
            _fail(self._under_way.pop(reply.number), KeysFailed(reply.reason))


def _fail(future: asyncio.Future[bytes], error: KeysFailed) -> None:
    if not future.done():
        future.set_exception(error)


class RemoteToken:
    """The token's process, and the keys that it reported."""

    def __init__(self, config: SignerConfig) -> None:
        """Start the process, before any thread and before the signer isolates itself: later it can't fork."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        self._control, line = (own for own, _ in pairs)
        self.line = Line(line)
        self._keys: dict[bytes, RemoteKey] = {}
        self._is_ready = False
        self.protections: tuple[str, ...] = ()
        self._process = os.fork()
        if not self._process:
            be_the_process(config, pairs)
        for _, other in pairs:
            other.close()

    def open(self) -> None:
        """Have the process isolate itself, read the PIN and open the token; then read its keys.

        Raises:
            IsolationError, NoSecret, TokenError: it can't; the text says why.
        """
        try:
            self._control.send(b"open")
            while not self._is_ready:
                self._take(receive(self._control))
        except (KeysFailed, OSError):
            raise TokenError(key="pkcs11.module", reason="the library crashed while it was opened") from None

    def _take(self, reply: TokenReply) -> None:
        match reply:
            case Keys(keys):
                for identifier, public_key in keys:
                    self._keys[identifier] = RemoteKey(self, identifier, public_key)
            case Ready(side_by_side, protections):
                self._is_ready, self.protections = True, protections
                self.line.most_under_way = 2 * side_by_side

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._control.fileno()

    @property
    def has_ended(self) -> bool:
        """Whether the process has closed its end of the connections."""
        return bool(select.select([self._control], [], [], 0)[0])

    @property
    def has_keys(self) -> bool:
        """Whether the token has any key of this signer."""
        return bool(self._keys)

    def find(self, name: KeyName) -> RemoteKey | None:
        """Return a key, or None."""
        return self._keys.get(name.identifier)

    def find_or_make(self, name: KeyName) -> RemoteKey:
        """Return a key; if there is none, have the process make it, which blocks: the start makes all that are needed.

        Raises:
            KeysFailed: the token failed, or the process has ended.
        """
        if name.identifier not in self._keys:
            try:
                self._control.send(encode(Make(*name)))
            except OSError:
                raise KeysFailed(ENDED) from None
            self._take(receive(self._control))
        return self._keys[name.identifier]

    def close(self) -> None:
        """Let the process close its sessions, and wait for its end."""
        self._control.close()
        deadline = time.monotonic() + CLOSING_SECONDS + 1
        with suppress(ChildProcessError):
            while os.waitpid(self._process, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.kill(self._process, signal.SIGKILL)
                time.sleep(0.01)
