"""One connection of the Electrum protocol: JSON-RPC, one message a line, over TCP or TLS.

No library fits. aiorpcX 0.25, which Electrum and ElectrumX use, ends pending calls on a lost connection with
CancelledError, leaves later calls waiting, leaves its time-outs behind as cancellations of the task, and reads
fractions as floats; connectrum and electrum-client can't pin a certificate. So this module has the same design as
`paychan.signer_client.unix`.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct

from paychan.chain.base import ChainFailed, ChainRefused

_MAX_LINE_BYTES = 10 * 1024 * 1024
"""More than the hex digits of the largest transaction that fits into a block."""

_MAX_IN_FLIGHT = 50
"""Most requests without an answer; servers slow down a client that sends more at a time."""

_MAX_REASON = 300
"""Servers quote whole transactions in their reasons."""

_PING_SECONDS = 60
"""Detects that a silent connection is dead; servers close a connection without requests after ten minutes."""

_T = TypeVar("_T")


class ServerRefused(ChainRefused):
    """The server answered with an error. Codes: 1 bad request, 2 its node's error, else those of JSON-RPC 2.0."""

    def __init__(self, question: str, code: int, reason: str) -> None:
        super().__init__(f"{question} refused, code {code}: {reason[:_MAX_REASON]}")
        self.code = code


class _Request(Struct):
    id: int
    method: str
    params: tuple[object, ...]
    jsonrpc: str = "2.0"


class _Error(Struct):
    code: int = 0
    message: str = ""


class _Message(Struct):
    """An answer has the id of its request; a notification has none."""

    id: int | None = None
    result: Raw = Raw(b"null")
    error: _Error | None = None


_encoder = msgspec.json.Encoder()
_messages = msgspec.json.Decoder(_Message)


class ElectrumConnection:
    """A connection and its pending requests. An answer arrives by the deadline, or the connection is closed.

    `on_news` is called for every notification, and once more when the connection is lost.
    """

    def __init__(
        self,
        name: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        deadline_seconds: float,
        on_news: Callable[[], None],
    ) -> None:
        self._name = name
        self._reader = reader
        self._writer = writer
        self._deadline = deadline_seconds
        self._on_news = on_news
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[_Message]] = {}
        self._slots = asyncio.Semaphore(_MAX_IN_FLIGHT)
        self._receiving = asyncio.create_task(self._receive())
        self._pinging = asyncio.create_task(self._ping())

    @classmethod
    async def open(
        cls,
        name: str,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        deadline_seconds: float,
        on_news: Callable[[], None],
    ) -> ElectrumConnection:
        """Connect; errors name the server by `name`. Raises `OSError`, of which `ssl.SSLError` is a subclass."""
        reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=_MAX_LINE_BYTES)
        return cls(name, reader, writer, deadline_seconds, on_news)

    @property
    def lost(self) -> bool:
        return self._receiving.done() or self._writer.is_closing()

    @property
    def certificate(self) -> bytes | None:
        """The server's certificate (DER), proved by the TLS handshake; None without TLS."""
        secured: ssl.SSLObject | None = self._writer.get_extra_info("ssl_object")
        return None if secured is None else secured.getpeercert(binary_form=True)

    async def ask(self, method: str, *params: object, kind: type[_T]) -> _T:
        """Send a request, and decode the answer as `kind`.

        Raises:
            ServerRefused: the answer is an error.
            ChainFailed: no answer by the deadline, the connection broke, or the answer has another form.
        """
        question = f"{self._name}: {method}"
        async with self._slots:
            message = await self._answer(question, _Request(next(self._ids), method, params))
        if message.error is not None:
            raise ServerRefused(question, message.error.code, message.error.message)
        try:
            return msgspec.json.decode(message.result, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            msg = f"{question}: not an answer of the Electrum protocol: {error}"
            raise ChainRefused(msg) from None

    async def close(self) -> None:
        """Close; pending calls raise `ChainFailed`. Aborts: a TLS shutdown would wait for a server that hangs."""
        self._writer.transport.abort()
        with suppress(OSError):
            await self._writer.wait_closed()
        await self._receiving

    async def _answer(self, question: str, request: _Request) -> _Message:
        if self.lost:
            msg = f"{question}: connection lost"
            raise ChainFailed(msg)
        future: asyncio.Future[_Message] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        try:
            async with asyncio.timeout(self._deadline):
                self._writer.write(_encoder.encode(request) + b"\n")
                await self._writer.drain()
                return await future
        except TimeoutError:
            self._writer.transport.abort()  # later answers have no reader; the next call opens a new connection
            msg = f"{question}: no answer within {self._deadline} s"
            raise ChainFailed(msg) from None
        except OSError as error:
            msg = f"{question}: {error.strerror or error}"
            raise ChainFailed(msg) from None
        finally:
            self._waiting.pop(request.id, None)

    async def _receive(self) -> None:
        """Deliver answers until the connection ends."""
        reason = "connection closed by the server"
        try:
            while True:
                self._hand_out(_messages.decode(await self._reader.readuntil(b"\n")))
        except asyncio.IncompleteReadError:
            pass
        except asyncio.LimitOverrunError:
            reason = f"a line of more than {_MAX_LINE_BYTES} bytes"
        except OSError as error:
            reason = error.strerror or str(error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            reason = f"not a message of JSON-RPC: {error}"
        finally:
            self._writer.transport.abort()
            self._pinging.cancel()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionResetError(reason))
            self._on_news()

    async def _ping(self) -> None:
        with suppress(ChainFailed):
            while True:
                await asyncio.sleep(_PING_SECONDS)
                await self.ask("server.ping", kind=Raw)

    def _hand_out(self, message: _Message) -> None:
        if message.id is None:
            self._on_news()  # the named script or header is not used: waiting callers read all of it again
        elif (future := self._waiting.get(message.id)) is not None and not future.done():
            future.set_result(message)
