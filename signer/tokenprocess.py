"""A token's library in a process of its own: `service` starts it first of all, and is its only client.

What the library of a token's maker does wrong, it does there: away from the server's socket, from the policies and what they
remember. The PIN is read there and nowhere else, and where the library needs a network, the signer itself still has none. Nor
does judging wait for signing: Python runs one thread at a time in a process.

The two talk over pairs of sockets, a message each way in turn, one pair for each signature that the token makes at a time. A
further pair, the control, tells at the start what there is, and ends at one end when the process at the other has ended.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
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


class _Make(Struct, frozen=True, array_like=True, tag=2):
    identifier: bytes
    label: bytes


class _Signed(Struct, frozen=True, array_like=True, tag=101):
    signature: bytes


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


_Request: TypeAlias = _Sign | _Make
_Reply: TypeAlias = _Signed | _Keys | _Ready | _Failed

_encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[_Request] = msgspec.msgpack.Decoder(_Request)
_replies: msgspec.msgpack.Decoder[_Reply] = msgspec.msgpack.Decoder(_Reply)

_OF_KEYS = {kind.__name__: kind for kind in (KeysFailed, KeysExhausted)}
_OF_SETTINGS = {kind.__name__: kind for kind in (IsolationError, NoSecret, TokenError)}

_ENDED = "the token's process has ended"


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


class TokenProcess:
    """The process, and the keys that it told of. Any thread may call it once it is open."""

    def __init__(self, config: SignerConfig) -> None:
        """Start the process. Before any thread, and before the signer isolates itself: afterwards it can't any more."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(config.pkcs11.sessions + 1)]
        self._wait_seconds = config.socket.request_seconds
        self._control, *self._channels = (ours for ours, _ in pairs)
        self._idle: SimpleQueue[socket.socket] = SimpleQueue()
        self._keys: dict[bytes, RemoteKey] = {}
        self.side_by_side = 0
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
            while not self.side_by_side:
                self._take(_received(self._control))
        except (KeysFailed, OSError):
            raise TokenError(key="pkcs11.module", reason="the library crashed when it was opened") from None

    def _take(self, reply: _Reply) -> None:
        match reply:
            case _Keys(keys):
                for identifier, public_key in keys:
                    self._keys[identifier] = RemoteKey(self, identifier, public_key)
            case _Ready(side_by_side, protections):
                self.side_by_side, self.protections = side_by_side, protections
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
            msg = f"all {self.side_by_side} sessions with the token are busy"
            raise KeysFailed(msg) from None
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
        control, *channels = (theirs for _, theirs in pairs)
        _serve(config, control, channels)
        status = 0
    except Exception as error:  # noqa: BLE001 - nobody is there to catch it
        tell_bug(error)
    except KeyboardInterrupt:
        pass  # while the PIN was asked for
    finally:
        sys.stderr.flush()
        os._exit(status)  # a thread that hangs in the library would hold up an ordinary end


def _serve(config: SignerConfig, control: socket.socket, channels: Sequence[socket.socket]) -> None:
    """Open the token when asked to, then sign until the signer lets go."""
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
    for channel in channels:
        Thread(target=_answer_all, args=(token, channel), daemon=True).start()
    control.recv(1)
    closing = Thread(target=token.close, daemon=True)
    closing.start()
    closing.join(_CLOSING_SECONDS)


def _answer_all(token: Token, channel: socket.socket) -> None:
    """Answer one channel for ever; each has a thread."""
    while raw := channel.recv(_MOST_MESSAGE_BYTES):
        channel.send(_encode(_answer(token, _requests.decode(raw))))


def _answer(token: Token, request: _Request) -> _Reply:
    try:
        match request:
            case _Sign(identifier, digest):
                return _Signed(token.key(identifier).sign(digest))
            case _Make(identifier, label):
                made = token.find_or_make(KeyName(identifier, label))
                return _Keys(((identifier, made.public_key),))
    except (KeysFailed, KeysExhausted) as error:
        return _Failed(type(error).__name__, str(error))
    except Exception as error:  # noqa: BLE001 - a bug must not end the process, nor show what it handled
        tell_bug(error)
        return _Failed(KeysFailed.__name__, "the signer failed at the token")
