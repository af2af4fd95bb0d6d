"""Perform flows, blocking or on an event loop: requests over httpx, streams over module `websocket`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, TypeVar

import httpx

from paychan.client.errors import ServerMisbehaved
from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import (
    TIME_LIMIT_SECONDS,
    Answer,
    Connect,
    Flow,
    NoAnswer,
    Pause,
    Receive,
    Received,
    Request,
    Response,
    Retry,
    Save,
    Send,
)

if TYPE_CHECKING:
    from paychan.client.transport.websocket import AsyncStream, Stream

T = TypeVar("T")

MAX_BODY_BYTES = 64 * 1024
"""Largest body to read; every answer of this protocol is far smaller."""

_ANSWER_SECONDS = 30.0
"""A closing waits for signer and node; every other request takes milliseconds."""

_CONNECT_SECONDS = 10.0

_HEADERS = {"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"}


class Deadline:
    """The end of the time that a call may take. A pause that the caller asked for and news on a stream renew it."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self.renew()

    def renew(self) -> None:
        self._end = time.monotonic() + self._limit

    @property
    def left(self) -> float:
        """Seconds left; 0 if the time is over."""
        return max(0.0, self._end - time.monotonic())

    def over(self) -> NoAnswer:
        return NoAnswer(f"nothing within the time limit of {self._limit:g} s", last=True)


def drive(
    flow: Flow[T], http: httpx.Client, keep: Callable[[ChannelRecord], None], limit_seconds: float = TIME_LIMIT_SECONDS
) -> T:
    """Run a flow to its end, blocking. `keep` makes a record durable and adopts it."""
    answer: Answer = None
    deadline = Deadline(limit_seconds)
    stream: Stream | None = None
    with ExitStack() as closing:
        while True:
            try:
                effect = flow.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = None
            match effect:
                case Request():
                    answer = _send(http, effect, deadline)
                case Connect() | Send() | Receive():
                    if stream is None:
                        from paychan.client.transport.websocket import Stream

                        stream = closing.enter_context(Stream())
                    answer = stream.perform(effect, deadline.left)
                    _note(answer, deadline)
                case Save(record):
                    keep(record)
                case Pause(seconds):
                    time.sleep(seconds)
                    deadline.renew()
                case Retry(seconds):
                    if seconds < deadline.left:
                        time.sleep(seconds)
                    else:
                        answer = deadline.over()


async def drive_async(
    flow: Flow[T],
    http: httpx.AsyncClient,
    keep: Callable[[ChannelRecord], None],
    limit_seconds: float = TIME_LIMIT_SECONDS,
) -> T:
    """Run a flow to its end on the event loop. A worker thread writes the records."""
    answer: Answer = None
    deadline = Deadline(limit_seconds)
    stream: AsyncStream | None = None
    async with AsyncExitStack() as closing:
        while True:
            try:
                effect = flow.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = None
            match effect:
                case Request():
                    answer = await _send_async(http, effect, deadline)
                case Connect() | Send() | Receive():
                    if stream is None:
                        from paychan.client.transport.websocket import AsyncStream

                        stream = await closing.enter_async_context(AsyncStream())
                    answer = await stream.perform(effect, deadline.left)
                    _note(answer, deadline)
                case Save(record):
                    await _keep_whole(keep, record)
                case Pause(seconds):
                    await asyncio.sleep(seconds)
                    deadline.renew()
                case Retry(seconds):
                    if seconds < deadline.left:
                        await asyncio.sleep(seconds)
                    else:
                        answer = deadline.over()


def _note(answer: Answer, deadline: Deadline) -> None:
    """Renew the time of a series of payments with each answer on its stream."""
    if isinstance(answer, Received):
        deadline.renew()


async def _keep_whole(keep: Callable[[ChannelRecord], None], record: ChannelRecord) -> None:
    """Write the record. If the task is cancelled, finish the write first: the next writer must not overtake it."""
    writing = asyncio.ensure_future(asyncio.to_thread(keep, record))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


def _send(http: httpx.Client, request: Request, deadline: Deadline) -> Response | NoAnswer:
    """Send a request. httpx counts its time for each part of an answer, so the time of all parts is counted here."""
    if not deadline.left:
        return deadline.over()
    body = bytearray()
    try:
        with http.stream(
            request.method, request.url, content=request.body, headers=_HEADERS, timeout=_timeout(deadline)
        ) as reply:
            for part in reply.iter_raw():
                _gather(body, part)
                if not deadline.left:
                    return deadline.over()
            return _response(reply, body)
    except httpx.TransportError as error:
        return NoAnswer(str(error) or type(error).__name__) if deadline.left else deadline.over()


async def _send_async(http: httpx.AsyncClient, request: Request, deadline: Deadline) -> Response | NoAnswer:
    body = bytearray()
    try:
        async with (
            asyncio.timeout(deadline.left),
            http.stream(
                request.method, request.url, content=request.body, headers=_HEADERS, timeout=_timeout(deadline)
            ) as reply,
        ):
            async for part in reply.aiter_raw():
                _gather(body, part)
            return _response(reply, body)
    except TimeoutError:
        return deadline.over()
    except httpx.TransportError as error:
        return NoAnswer(str(error) or type(error).__name__) if deadline.left else deadline.over()


def _timeout(deadline: Deadline) -> httpx.Timeout:
    return httpx.Timeout(min(_ANSWER_SECONDS, deadline.left), connect=min(_CONNECT_SECONDS, deadline.left))


def _gather(body: bytearray, part: bytes) -> None:
    body += part
    if len(body) > MAX_BODY_BYTES:
        raise ServerMisbehaved(what="answer in bytes", got=f"{len(body)} and more", want=f"at most {MAX_BODY_BYTES}")


def _response(reply: httpx.Response, body: bytearray) -> Response:
    return Response(reply.status_code, reply.reason_phrase, dict(reply.headers), bytes(body))
