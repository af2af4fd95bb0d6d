"""Messages between the signer and its token's process (`client`, `process`); each message is a packet.

Both processes are forked from one program, so the messages may change with any release.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec
from msgspec import Struct

from signer.keys.ring import KeysFailed
from signer.sandbox.isolation import IsolationError
from signer.secret.sources import NoSecret
from signer.token.sessions import TokenError

MOST_BYTES = 64 * 1024
KEYS_IN_MESSAGE = 200

ENDED = "the token's process has ended"


class Sign(Struct, frozen=True, array_like=True, tag=1):
    """Sign a digest with a key."""

    identifier: bytes
    digest: bytes
    number: int = 0
    """Number of a request on the line, where replies come in any order."""


class Make(Struct, frozen=True, array_like=True, tag=2):
    """Make a key of this name, unless it exists."""

    identifier: bytes
    label: bytes


class Signed(Struct, frozen=True, array_like=True, tag=101):
    """Strict DER, low S."""

    signature: bytes
    number: int


class Keys(Struct, frozen=True, array_like=True, tag=102):
    """Identifiers and public keys."""

    keys: tuple[tuple[bytes, bytes], ...]


class Ready(Struct, frozen=True, array_like=True, tag=103):
    """All keys were reported: the number of signatures at the same time, and the process's protections."""

    side_by_side: int
    protections: tuple[str, ...]


class Failed(Struct, frozen=True, array_like=True, tag=104):
    """An error, by the name of its class; `key` is the setting that it concerns."""

    kind: str
    reason: str
    key: str = ""
    number: int = 0


TokenRequest: TypeAlias = Sign | Make
TokenReply: TypeAlias = Signed | Keys | Ready | Failed

encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[TokenRequest] = msgspec.msgpack.Decoder(TokenRequest)
_replies: msgspec.msgpack.Decoder[TokenReply] = msgspec.msgpack.Decoder(TokenReply)
decode_request, decode_reply = _requests.decode, _replies.decode

_OF_KEYS = {kind.__name__: kind for kind in (KeysFailed,)}
_OF_SETTINGS = {kind.__name__: kind for kind in (IsolationError, NoSecret, TokenError)}


def receive(channel: socket.socket) -> TokenReply:
    """Wait for a reply. Raises the reported error, and `KeysFailed` when the other process has ended."""
    raw = channel.recv(MOST_BYTES)
    if not raw:
        raise KeysFailed(ENDED)
    reply = decode_reply(raw)
    if not isinstance(reply, Failed):
        return reply
    if reply.kind in _OF_KEYS:
        raise _OF_KEYS[reply.kind](reply.reason)
    raise _OF_SETTINGS[reply.kind](key=reply.key, reason=reply.reason)
