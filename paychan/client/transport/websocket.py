"""The stream of a flow, over the library `websockets`: blocking (`Stream`) or on an event loop (`AsyncStream`)."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Self

from websockets.asyncio.client import ClientConnection as AsyncConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from paychan.client.transport.effects import Connect, Connected, NoAnswer, Receive, Received, Send
from paychan.client.transport.proxy import proxy_of

_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 30
"""Time limit for an answer. A frame takes milliseconds; an application that judges each payment may take longer."""

_MAX_FRAME_BYTES = 1 << 20
"""Largest frame to read; every frame of answers is far smaller."""


def _options(effect: Connect, seconds: float) -> dict[str, Any]:
    return {
        "proxy": proxy_of("http" + effect.url.removeprefix("ws")),
        "additional_headers": {"Authorization": f"Bearer {effect.secret}"},
        "compression": None,
        "open_timeout": min(_CONNECT_SECONDS, seconds),
        "max_size": _MAX_FRAME_BYTES,
    }


def _reason(error: Exception) -> NoAnswer:
    if isinstance(error, ConnectionClosed) and error.rcvd is not None:
        return NoAnswer(f"stream closed: {error.rcvd.code} {error.rcvd.reason}")
    return NoAnswer(str(error) or type(error).__name__)


class Stream:
    """A stream with blocking methods."""

    def __init__(self) -> None:
        self._connection: ClientConnection | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def perform(self, effect: Connect | Send | Receive, seconds: float) -> Connected | Received | NoAnswer | None:
        """Perform an effect within `seconds`. Without the packages for a SOCKS proxy there is no stream."""
        try:
            if isinstance(effect, Connect):
                self._connection = self._stack.enter_context(connect(effect.url, **_options(effect, seconds)))
                return Connected()
            if self._connection is None:
                return NoAnswer("no stream")
            if isinstance(effect, Receive):
                frame = self._connection.recv(min(_ANSWER_SECONDS, seconds))
                return Received(frame if isinstance(frame, bytes) else b"")
            self._connection.send(effect.frame)
        except (OSError, WebSocketException, EOFError, ImportError) as error:
            return None if isinstance(effect, Send) else _reason(error)
        return None


class AsyncStream:
    """A stream with coroutines."""

    def __init__(self) -> None:
        self._connection: AsyncConnection | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def perform(self, effect: Connect | Send | Receive, seconds: float) -> Connected | Received | NoAnswer | None:
        """Perform an effect like `Stream.perform`."""
        try:
            if isinstance(effect, Connect):
                self._connection = await self._stack.enter_async_context(
                    connect_async(effect.url, **_options(effect, seconds))
                )
                return Connected()
            if self._connection is None:
                return NoAnswer("no stream")
            if isinstance(effect, Receive):
                async with asyncio.timeout(min(_ANSWER_SECONDS, seconds)):
                    frame = await self._connection.recv()
                return Received(frame if isinstance(frame, bytes) else b"")
            await self._connection.send(effect.frame)
        except (OSError, WebSocketException, EOFError, ImportError) as error:
            return None if isinstance(effect, Send) else _reason(error)
        return None
