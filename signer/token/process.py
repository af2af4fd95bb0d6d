"""The token's process: runs the token's library. `service` forks it first of all; `client` is its only peer.

Faults of the library's code stay in this process, away from the server's socket, the policies and the ledger. Only this
process reads the PIN, and if the library needs a network, the signer itself still has none. Judging does not wait for
signing either: Python runs one thread at a time in a process.
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
"""Time for the token to close its sessions; after that the process ends."""


def be_the_process(config: SignerConfig, pairs: Sequence[tuple[socket.socket, socket.socket]]) -> NoReturn:
    """Run the new process to its end."""
    status = 1
    try:
        for own, _ in pairs:
            own.close()
        control, line = (other for _, other in pairs)
        _serve(config, control, line)
        status = 0
    except Exception as error:  # noqa: BLE001 - no caller is left to catch it
        vital.tell_bug(error)
    except KeyboardInterrupt:
        pass  # while the prompt asked for the PIN
    finally:
        sys.stderr.flush()
        os._exit(status)  # a thread that hangs in the library would delay an ordinary end


def _serve(config: SignerConfig, control: socket.socket, line: socket.socket) -> None:
    """Open the token when requested, then answer both connections until the signer closes the control."""
    control.recv(1)
    try:
        protections = isolate(config.isolation, token=True)
        end_with_parent(signal.SIGTERM)  # at the question for the PIN, it lets the terminal's echo be restored
        token = read_pin_and_open(config)
        end_with_parent()
    except (IsolationError, NoSecret, TokenError) as error:
        control.send(encode(Failed(type(error).__name__, str(error), error.key)))
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # both processes get them; the signer decides
    keys = token.public_keys()
    while some := tuple(islice(keys, KEYS_IN_MESSAGE)):
        control.send(encode(Keys(some)))
    control.send(encode(Ready(token.side_by_side, protections)))
    for _ in range(token.side_by_side):
        vital.start_thread("token's line", partial(_answer_all, token, line))
    _answer_all(token, control)
    closing = Thread(target=token.close, daemon=True)
    closing.start()
    closing.join(CLOSING_SECONDS)


def _answer_all(token: Token, wire: socket.socket) -> None:
    """Answer requests until the signer closes the connection. Threads share the line: each takes the next request."""
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
    except Exception as error:  # noqa: BLE001 - a bug must neither end the process nor show request data
        vital.tell_bug(error)
        return Failed(KeysFailed.__name__, "the signer failed at the token", number=number)
