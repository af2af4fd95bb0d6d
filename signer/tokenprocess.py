"""A token's library in a process of its own: `service` starts it first of all, and is its only client.

What the library of a token's maker does wrong, it does there: away from the server's socket, from the policies and what they
remember. The PIN is read there and nowhere else, and where the library needs a network, the signer itself still has none. Nor
does judging wait for signing: Python runs one thread at a time in a process.

The two talk over pairs of sockets. The control tells at the start what there is, and ends at one end when the process at the
other has ended. Over the line go signatures that the event loop asks for, many under way at a time: whichever thread of the
process is free takes the next. Over the channels go questions of threads that wait for the answer, such as for a new key.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import count, islice
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NoReturn, TypeAlias

import msgspec
from msgspec import Struct

from signer.answering import tell_bug
from signer.config import SignerConfig
from signer.isolation import IsolationError, end_with_parent, isolate
from signer.keys import KeysExhausted, KeysFailed
from signer.passphrase import NoSecret
from signer.pkcs11 import Token, read_pin_and_open
from signer.sessions import TokenError
from signer.tokenobjects import KeyName

_MOST_MESSAGE_BYTES = 64 * 1024
_KEYS_IN_MESSAGE = 200

_CLOSING_SECONDS = 2.0
"""A token that does not take its sessions back by then finds them gone."""


class _Sign(Struct, frozen=True, array_like=True, tag=1):
    identifier: bytes
    digest: bytes
    number: int = 0
    """Of a question over the line, where answers come in any order."""


class _Make(Struct, frozen=True, array_like=True, tag=2):
    identifier: bytes
    label: bytes


class _Signed(Struct, frozen=True, array_like=True, tag=101):
    signature: bytes
    number: int


class _Keys(Struct, frozen=True, array_like=True, tag=102):
    """Identifiers and public keys."""

    keys: tuple[tuple[bytes, bytes], ...]


class _Ready(Struct, frozen=True, array_like=True, tag=103):
    """All keys were told."""

    side_by_side: int
    protections: tuple[str, ...]


class _Failed(Struct, frozen=True, array_like=True, tag=104):
    """An error of these names; `key` is the setting that it is about."""

    kind: str
    reason: str
    key: str = ""
    number: int = 0


_Request: TypeAlias = _Sign | _Make
_Reply: TypeAlias = _Signed | _Keys | _Ready | _Failed

_encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[_Request] = msgspec.msgpack.Decoder(_Request)
_replies: msgspec.msgpack.Decoder[_Reply] = msgspec.msgpack.Decoder(_Reply)

_OF_KEYS = {kind.__name__: kind for kind in (KeysFailed, KeysExhausted)}
_OF_SETTINGS = {kind.__name__: kind for kind in (IsolationError, NoSecret, TokenError)}

_ENDED = "the token's process has ended"
_BUSY = "all sessions with the token are busy"


# --- the signer's side ----------------------------------------------------------------------------------------------


class RemoteKey:
    """A key pair in the token, as the signer sees it."""

    __slots__ = ("_identifier", "_token", "public_key")

    def __init__(self, token: TokenProcess, identifier: bytes, public_key: bytes) -> None:
        self._token = token
        self._identifier = identifier
        self.public_key = public_key

    def sign(self, digest: bytes) -> bytes:
        """See `keys.SigningKey`."""
        reply = self._token.ask(_Sign(self._identifier, digest))
        if not isinstance(reply, _Signed):
            raise KeysFailed(_ENDED)
        return reply.signature

    def sign_soon(self, digest: bytes) -> asyncio.Future[bytes]:
        """See `keys.SlowKey`."""
        return self._token.line.sign(self._identifier, digest)


class Line:
    """What the event loop wants signed. A few more than the token signs at a time are under way, the others wait here."""

    def __init__(self, wire: socket.socket) -> None:
        wire.setblocking(False)
        self.most_under_way = 1
        self._wire = wire
        self._numbers = count()
        self._under_way: dict[int, asyncio.Future[bytes]] = {}
        self._waiting: deque[tuple[asyncio.Future[bytes], bytes, bytes]] = deque()
        self._is_heard = False

    def sign(self, identifier: bytes, digest: bytes) -> asyncio.Future[bytes]:
        """Have a digest signed by a key. What is cancelled before its turn comes is left out."""
        loop = asyncio.get_running_loop()
        if not self._is_heard:
            self._is_heard = True
            loop.add_reader(self._wire, self._hear)
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
                self._wire.send(_encode(_Sign(identifier, digest, number)))
            except OSError:
                future.set_exception(KeysFailed(_ENDED))
                continue
            self._under_way[number] = future

    def _hear(self) -> None:
        """Take what has come; called by the event loop."""
        with suppress(BlockingIOError):
            while raw := self._wire.recv(_MOST_MESSAGE_BYTES):
                self._take(_replies.decode(raw))
            asyncio.get_running_loop().remove_reader(
                self._wire
            )  # nothing comes any more, and `_ask` finds that out too
            for future in self._under_way.values():
                _fail(future, KeysFailed(_ENDED))
            self._under_way.clear()
        self._ask()

    def _take(self, reply: _Reply) -> None:
        if isinstance(reply, _Signed):
            future = self._under_way.pop(reply.number)
            if not future.done():
                future.set_result(reply.signature)
        elif isinstance(reply, _Failed):
            _fail(self._under_way.pop(reply.number), KeysFailed(reply.reason))


def _fail(future: asyncio.Future[bytes], error: KeysFailed) -> None:
    if not future.done():
        future.set_exception(error)


class TokenProcess:
    """The process, and the keys that it told of. Any thread may call it once it is open."""

    def __init__(self, config: SignerConfig) -> None:
        """Start the process. Before any thread, and before the signer isolates itself: afterwards it can't any more."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2 + config.pkcs11.sessions)]
        self._wait_seconds = config.socket.request_seconds
        self._control, line, *self._channels = (ours for ours, _ in pairs)
        self.line = Line(line)
        self._idle: SimpleQueue[socket.socket] = SimpleQueue()
        self._keys: dict[bytes, RemoteKey] = {}
        self._is_ready = False
        self.protections: tuple[str, ...] = ()
        self._process = os.fork()
        if not self._process:
            _be_the_process(config, pairs)
        for _, theirs in pairs:
            theirs.close()

    def open(self) -> None:
        """Have it isolate itself, read the PIN and open the token; then get to know all keys.

        Raises:
            IsolationError, NoSecret, TokenError: it can't, and why.
        """
        try:
            self._control.send(b"open")
            while not self._is_ready:
                self._take(_received(self._control))
        except (KeysFailed, OSError):
            raise TokenError(key="pkcs11.module", reason="the library crashed when it was opened") from None

    def _take(self, reply: _Reply) -> None:
        match reply:
            case _Keys(keys):
                for identifier, public_key in keys:
                    self._keys[identifier] = RemoteKey(self, identifier, public_key)
            case _Ready(side_by_side, protections):
                self._is_ready, self.protections = True, protections
                self.line.most_under_way = 2 * side_by_side
                for channel in self._channels[:side_by_side]:
                    self._idle.put(channel)

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._control.fileno()

    @property
    def has_ended(self) -> bool:
        """Whether there is nobody at the other end of the wires."""
        return bool(select.select([self._control], [], [], 0)[0])

    def find(self, name: KeyName) -> RemoteKey | None:
        """Return a key, if there is one."""
        return self._keys.get(name.identifier)

    def find_or_make(self, name: KeyName) -> RemoteKey:
        """Return a key, a new one if there is none. Raises `KeysFailed`, `KeysExhausted`."""
        return self.find(name) or self._make(name)

    def _make(self, name: KeyName) -> RemoteKey:
        self._take(self.ask(_Make(*name)))
        return self._keys[name.identifier]

    def ask(self, request: _Request) -> _Reply:
        """Ask, and wait for as long as the token takes.

        Raises:
            KeysFailed: all channels are waiting, the token failed, or the process has ended.
            KeysExhausted: it makes no more keys.
        """
        try:
            channel = self._idle.get(timeout=self._wait_seconds)
        except Empty:
            raise KeysFailed(_BUSY) from None
        try:
            channel.send(_encode(request))
            return _received(channel)
        except OSError:
            raise KeysFailed(_ENDED) from None
        finally:
            self._idle.put(channel)

    def close(self) -> None:
        """Let it give the sessions back, and see that it ends."""
        self._control.close()
        deadline = time.monotonic() + _CLOSING_SECONDS + 1
        with suppress(ChildProcessError):
            while os.waitpid(self._process, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.kill(self._process, signal.SIGKILL)
                time.sleep(0.01)


def _received(channel: socket.socket) -> _Reply:
    """Read a reply; raises what it tells of."""
    raw = channel.recv(_MOST_MESSAGE_BYTES)
    reply = _replies.decode(raw) if raw else _Failed(KeysFailed.__name__, _ENDED)
    if not isinstance(reply, _Failed):
        return reply
    if reply.kind in _OF_KEYS:
        raise _OF_KEYS[reply.kind](reply.reason)
    raise _OF_SETTINGS[reply.kind](key=reply.key, reason=reply.reason)


# --- the token's side -----------------------------------------------------------------------------------------------


def _be_the_process(config: SignerConfig, pairs: Sequence[tuple[socket.socket, socket.socket]]) -> NoReturn:
    """All of the new process's life."""
    status = 1
    try:
        for ours, _ in pairs:
            ours.close()
        control, line, *channels = (theirs for _, theirs in pairs)
        _serve(config, control, [*channels, *[line] * len(channels)])
        status = 0
    except Exception as error:  # noqa: BLE001 - nobody is there to catch it
        tell_bug(error)
    except KeyboardInterrupt:
        pass  # while the PIN was asked for
    finally:
        sys.stderr.flush()
        os._exit(status)  # a thread that hangs in the library would hold up an ordinary end


def _serve(config: SignerConfig, control: socket.socket, wires: Sequence[socket.socket]) -> None:
    """Open the token when asked to, then answer each wire in a thread until the signer lets go."""
    control.recv(1)
    try:
        protections = isolate(config.isolation, token=True)
        end_with_parent()
        token = read_pin_and_open(config)
    except (IsolationError, NoSecret, TokenError) as error:
        control.send(_encode(_Failed(type(error).__name__, str(error), error.key)))
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # they come to both, and the signer decides what happens
    keys = token.public_keys()
    while some := tuple(islice(keys, _KEYS_IN_MESSAGE)):
        control.send(_encode(_Keys(some)))
    control.send(_encode(_Ready(token.side_by_side, protections)))
    for wire in wires:
        Thread(target=_answer_all, args=(token, wire), daemon=True).start()
    control.recv(1)
    closing = Thread(target=token.close, daemon=True)
    closing.start()
    closing.join(_CLOSING_SECONDS)


def _answer_all(token: Token, wire: socket.socket) -> None:
    """Answer for ever, in a thread of its own: a channel, or with others the line, whose next question only one of them gets."""
    while raw := wire.recv(_MOST_MESSAGE_BYTES):
        wire.send(_encode(_answer(token, _requests.decode(raw))))


def _answer(token: Token, request: _Request) -> _Reply:
    number = request.number if isinstance(request, _Sign) else 0
    try:
        match request:
            case _Sign(identifier, digest):
                return _Signed(token.key(identifier).sign(digest), number)
            case _Make(identifier, label):
                made = token.find_or_make(KeyName(identifier, label))
                return _Keys(((identifier, made.public_key),))
    except (KeysFailed, KeysExhausted) as error:
        return _Failed(type(error).__name__, str(error), number=number)
    except Exception as error:  # noqa: BLE001 - a bug must not end the process, nor show what it handled
        tell_bug(error)
        return _Failed(KeysFailed.__name__, "the signer failed at the token", number=number)
