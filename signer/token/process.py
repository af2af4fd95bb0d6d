"""A token's library in a process of its own: `service` has it forked first of all, and is its only client (`remotetoken`).

What the library of a token's maker does wrong, it does here: away from the server's socket, from the policies and what they
remember. The PIN is read here and nowhere else, and where the library needs a network, the signer itself still has none. Nor
does judging wait for signing: Python runs one thread at a time in a process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from threading import Thread
from typing import NoReturn

from signer import vital
from signer.config import SignerConfig
from signer.keys.ring import KeysFailed
from signer.sandbox.isolation import IsolationError, end_with_parent, isolate
from signer.secret.sources import NoSecret
from signer.server.scheduling import tell_bug
from signer.token.keys import Token, read_pin_and_open
from signer.token.objects import KeyName
from signer.token.sessions import TokenError
from signer.token.wire import (
    KEYS_IN_MESSAGE,
    MOST_BYTES,
    Failed,
    Keys,
    Make,
    Ready,
    Sign,
    Signed,
    TokenReply,
    TokenRequest,
    decode_request,
    encode,
)

CLOSING_SECONDS = 2.0
"""A token that does not take its sessions back by then finds them gone."""


def be_the_process(config: SignerConfig, pairs: Sequence[tuple[socket.socket, socket.socket]]) -> NoReturn:
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
        control.send(encode(Failed(type(error).__name__, str(error), error.key)))
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # they come to both, and the signer decides what happens
    keys = token.public_keys()
    while some := tuple(islice(keys, KEYS_IN_MESSAGE)):
        control.send(encode(Keys(some)))
    control.send(encode(Ready(token.side_by_side, protections)))
    for wire in wires:
        vital.start_thread("token's wire", partial(_answer_all, token, wire))
    control.recv(1)
    closing = Thread(target=token.close, daemon=True)
    closing.start()
    closing.join(CLOSING_SECONDS)


def _answer_all(token: Token, wire: socket.socket) -> None:
    """Answer for ever, in a thread of its own: a channel, or with others the line, whose next question only one of them gets."""
    while raw := wire.recv(MOST_BYTES):
        wire.send(encode(_answer(token, decode_request(raw))))


def _answer(token: Token, request: TokenRequest) -> TokenReply:
    number = request.number if isinstance(request, Sign) else 0
    try:
        match request:
            case Sign(identifier, digest):
                return Signed(token.key(identifier).sign(digest), number)
            case Make(identifier, label):
                made = token.find_or_make(KeyName(identifier, label))
                return Keys(((identifier, made.public_key),))
    except KeysFailed as error:
        return Failed(type(error).__name__, str(error), number=number)
    except Exception as error:  # noqa: BLE001 - a bug must not end the process, nor show what it handled
        tell_bug(error)
        return Failed(KeysFailed.__name__, "the signer failed at the token", number=number)
