"""One connection to the signer's socket, opened on demand and again after a failure; many requests in flight."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from paychan.protocol.wire.signer_messages import (
    Health,
    HealthReply,
    Refusal,
    Reply,
    WireError,
    decode_reply,
    encode_frame,
    frame_size,
)
from paychan.shared.handover import handed_over

_TRIES = 6
"""A busy signer closes connections to make room; each pause between two tries is twice the previous one."""

_PAUSE_SECONDS = 0.02

_FIRST = 1
"""Request id of the first request on a connection, before any other."""


Misfit = Callable[[HealthReply], str]
"""Returns why a signer's settings do not fit; empty if they do."""


class WrongSigner(OSError):
    """A signer answers, but its settings do not fit this server."""


class SignerLink:
    """A connection to the signer at `path`. Errors are `OSError`s; after `ConnectionResetError` the result is unknown.

    With a `misfit`, each connection begins with a health request: after a restart it may be another signer.
    """

    def __init__(self, path: Path, misfit: Misfit | None = None) -> None:
        self._path = path
        self._misfit = misfit
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._closed = False

    async def close(self) -> None:
        """Close the connection; later requests fail."""
        self._closed = True
        if self._connection is not None:
            await self._connection.close()

    async def exchange(self, frame: bytes, request_id: int) -> Reply:
        """Send a request and wait for its reply; if the connection ends before, try a new one a few times.

        `stamina` would save three lines here, for two more packages and 22 µs per request that succeeds at once.
        """
        pause = _PAUSE_SECONDS
        for _ in range(_TRIES - 1):
            try:
                return await self._exchange(frame, request_id)
            except (ConnectionResetError, BrokenPipeError):
                await asyncio.sleep(pause)
                pause *= 2
        return await self._exchange(frame, request_id)

    async def _exchange(self, frame: bytes, request_id: int) -> Reply:
        try:
            return await (await self._connected()).ask(frame, request_id)
        except _Refused as refused:
            return refused.refusal

    async def _connected(self) -> _Connection:
        if self._connection is not None and not self._connection.lost:
            return self._connection
        async with self._connecting:
            if self._closed:
                msg = "client was closed"
                raise ConnectionAbortedError(msg)
            if self._connection is None or self._connection.lost:
                self._connection = await self._checked(_Connection(*await _connect(self._path)))
        return self._connection

    async def _checked(self, connection: _Connection) -> _Connection:
        if self._misfit is None:
            return connection
        try:
            reply = await connection.ask(encode_frame(Health(_FIRST)), _FIRST)
        except BaseException:
            await connection.close()
            raise
        if isinstance(reply, Refusal):
            await connection.close()
            raise _Refused(reply)
        wrong = self._misfit(reply) if isinstance(reply, HealthReply) else f"not a signer: {type(reply).__name__}"
        if wrong:
            await connection.close()
            raise WrongSigner(wrong)
        return connection


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and wait while the signer's queue is full; asyncio would take that state for a connection in progress."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        while True:
            try:
                connection.connect(str(path))
                break
            except BlockingIOError:
                await asyncio.sleep(_PAUSE_SECONDS)
    except BaseException:
        connection.close()
        raise
    with handed_over(connection):
        return await asyncio.open_unix_connection(sock=connection)


class _Refused(Exception):
    """The signer refuses the health request."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class _Connection:
    """One connection and its pending requests. `ConnectionResetError`: it ended, and the results are unknown."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._receiving = asyncio.create_task(self._receive())

    @property
    def lost(self) -> bool:
        return self._receiving.done() or self._writer.is_closing()

    async def ask(self, frame: bytes, request_id: int) -> Reply:
        """Send a request and wait for the reply to it."""
        await self._writer.drain()  # first: a signer that reads nothing must not fill this buffer without limit
        if self.lost:
            msg = "connection was closed"
            raise ConnectionResetError(msg)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            self._writer.write(frame)
            return await future
        finally:
            self._waiting.pop(request_id, None)

    async def close(self) -> None:
        self._receiving.cancel()
        with suppress(asyncio.CancelledError):
            await self._receiving
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _receive(self) -> None:
        """Deliver replies until the connection ends. A late reply, whose request has timed out, is dropped."""
        problem: OSError = ConnectionResetError("connection closed by the signer")
        try:
            while True:
                size = frame_size(await self._reader.readexactly(4))
                reply = decode_reply(await self._reader.readexactly(size))
                if reply.id == 0:
                    self._hand_to_all(reply)
                elif (future := self._waiting.get(reply.id)) is not None and not future.done():
                    future.set_result(reply)
        except asyncio.IncompleteReadError:
            pass
        except WireError as error:  # the peer speaks another protocol: another try would not help
            problem = ConnectionAbortedError(str(error))
        except OSError as error:
            problem = ConnectionResetError(str(error))
        finally:
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(problem)

    def _hand_to_all(self, reply: Reply) -> None:
        """Deliver a refusal of the whole connection to every pending request."""
        for future in self._waiting.values():
            if not future.done():
                future.set_result(reply)
