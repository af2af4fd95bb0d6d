"""Perform flows, blocking or on an event loop: requests over httpx, streams over module `websocket`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from paychan.client.errors import ServerMisbehaved
from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import (
    Answer,
    Connect,
    Flow,
    NoAnswer,
    Pause,
    Receive,
    Request,
    Response,
    Save,
    Send,
)
from paychan.client.transport.websocket import AsyncStream, Stream

T = TypeVar("T")

MAX_BODY_BYTES = 64 * 1024
"""Largest body to read; every answer of this protocol is far smaller."""

TIMEOUT = httpx.Timeout(30.0, connect=10.0)
"""A closing waits for signer and node; every other request takes milliseconds."""

_HEADERS = {"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"}


def drive(flow: Flow[T], http: httpx.Client, keep: Callable[[ChannelRecord], None]) -> T:
    """Run a flow to its end, blocking. `keep` makes a record durable and adopts it."""
    answer: Answer = None
    with Stream() as stream:
        while True:
            try:
                effect = flow.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = None
            match effect:
                case Request():
                    answer = _send(http, effect)
                case Connect() | Send() | Receive():
                    answer = stream.perform(effect)
                case Save(record):
                    keep(record)
                case Pause(seconds):
                    time.sleep(seconds)


async def drive_async(flow: Flow[T], http: httpx.AsyncClient, keep: Callable[[ChannelRecord], None]) -> T:
    """Run a flow to its end on the event loop. A worker thread writes the records."""
    answer: Answer = None
    async with AsyncStream() as stream:
        while True:
            try:
                effect = flow.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = None
            match effect:
                case Request():
                    answer = await _send_async(http, effect)
                case Connect() | Send() | Receive():
                    answer = await stream.perform(effect)
                case Save(record):
                    await _keep_whole(keep, record)
                case Pause(seconds):
                    await asyncio.sleep(seconds)


async def _keep_whole(keep: Callable[[ChannelRecord], None], record: ChannelRecord) -> None:
    """Write the record. If the task is cancelled, finish the write first: the next writer must not overtake it."""
    writing = asyncio.ensure_future(asyncio.to_thread(keep, record))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


def _send(http: httpx.Client, request: Request) -> Response | NoAnswer:
    body = bytearray()
    try:
        with http.stream(request.method, request.url, content=request.body, headers=_HEADERS) as reply:
            for part in reply.iter_raw():
                _gather(body, part)
            return _response(reply, body)
    except httpx.TransportError as error:
        return NoAnswer(str(error) or type(error).__name__)


async def _send_async(http: httpx.AsyncClient, request: Request) -> Response | NoAnswer:
    body = bytearray()
    try:
        async with http.stream(request.method, request.url, content=request.body, headers=_HEADERS) as reply:
            async for part in reply.aiter_raw():
                _gather(body, part)
            return _response(reply, body)
    except httpx.TransportError as error:
        return NoAnswer(str(error) or type(error).__name__)


def _gather(body: bytearray, part: bytes) -> None:
    body += part
    if len(body) > MAX_BODY_BYTES:
        raise ServerMisbehaved(what="answer in bytes", got=f"{len(body)} and more", want=f"at most {MAX_BODY_BYTES}")


def _response(reply: httpx.Response, body: bytearray) -> Response:
    return Response(reply.status_code, reply.reason_phrase, dict(reply.headers), bytes(body))
