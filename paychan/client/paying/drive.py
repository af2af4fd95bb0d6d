"""Perform an exchange, blocking or on an event loop. The adapters give it the ways to send and to drop."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, Generic, TypeVar

from paychan.client.paying.demands import Headers
from paychan.client.paying.exchange import Answer, Call, Effect, Pause, Try, Work

T = TypeVar("T")
R = TypeVar("R")


def perform(effect: Work | Call | Pause) -> Any:
    """Do what an effect asks for, and return what the exchange gets."""
    match effect:
        case Work(call) | Call(call):
            return call()
        case Pause(seconds):
            time.sleep(seconds)
    return None


async def perform_async(effect: Work | Call | Pause) -> Any:
    """Do what `perform` does, on the event loop; a worker thread reads and writes files."""
    match effect:
        case Work(call):
            return await _whole(call)
        case Call(call):
            return await _asked(call)
        case Pause(seconds):
            await asyncio.sleep(seconds)
    return None


class _Performer(Generic[T]):
    """Performs the effects of one exchange; it keeps the last response."""

    def __init__(self, send: Callable[[Headers], tuple[T, Answer]], drop: Callable[[T], None]) -> None:
        self._send, self._drop = send, drop
        self.response: T | None = None

    @property
    def last(self) -> T:
        """The program's response."""
        assert self.response is not None
        return self.response

    def perform(self, effect: Effect) -> Any:
        match effect:
            case Try(headers):
                self.drop()
                self.response, answer = self._send(headers)
                return answer
            case _:
                return perform(effect)

    def drop(self) -> None:
        response, self.response = self.response, None
        if response is not None:
            self._drop(response)


def drive(
    flow: Generator[Effect, Any, R],
    send: Callable[[Headers], tuple[T, Answer]],
    drop: Callable[[T], None],
    *,
    is_last_mine: bool = False,
) -> tuple[T, R]:
    """Run an exchange to its end; return the last response, and the result of the exchange.

    Args:
        flow: the exchange.
        send: sends the request with these headers added.
        drop: closes a response that is not the program's.
        is_last_mine: the last response is not the program's either.
    """
    performer = _Performer(send, drop)
    step: Callable[[], Effect] = partial(next, flow)
    try:
        while True:
            effect = step()
            try:
                value = performer.perform(effect)
            except BaseException as error:  # noqa: BLE001 - the exchange releases the channel, and raises it again
                step = partial(flow.throw, error)
            else:
                step = partial(flow.send, value)
    except StopIteration as done:
        response = performer.last
        if is_last_mine:
            performer.drop()
        return response, done.value
    except BaseException:
        performer.drop()
        raise


class _AsyncPerformer(Generic[T]):
    """Does what `_Performer` does, on the event loop."""

    def __init__(
        self, send: Callable[[Headers], Awaitable[tuple[T, Answer]]], drop: Callable[[T], Awaitable[None]]
    ) -> None:
        self._send, self._drop = send, drop
        self.response: T | None = None

    @property
    def last(self) -> T:
        """The program's response."""
        assert self.response is not None
        return self.response

    async def perform(self, effect: Effect) -> Any:
        match effect:
            case Try(headers):
                await self.drop()
                self.response, answer = await self._send(headers)
                return answer
            case _:
                return await perform_async(effect)

    async def drop(self) -> None:
        response, self.response = self.response, None
        if response is not None:
            await self._drop(response)


async def drive_async(
    flow: Generator[Effect, Any, R],
    send: Callable[[Headers], Awaitable[tuple[T, Answer]]],
    drop: Callable[[T], Awaitable[None]],
    *,
    is_last_mine: bool = False,
) -> tuple[T, R]:
    """Do what `drive` does; a worker thread reads and writes files."""
    performer = _AsyncPerformer(send, drop)
    step: Callable[[], Effect] = partial(next, flow)
    try:
        while True:
            effect = step()
            try:
                value = await performer.perform(effect)
            except BaseException as error:  # noqa: BLE001 - the exchange releases the channel, and raises it again
                step = partial(flow.throw, error)
            else:
                step = partial(flow.send, value)
    except StopIteration as done:
        response = performer.last
        if is_last_mine:
            await performer.drop()
        return response, done.value
    except BaseException:
        await performer.drop()
        raise


async def _whole(call: Callable[[], Any]) -> Any:
    """Call in a thread. If the task is cancelled, wait for the end of the call first: it holds the channel's lock."""
    working = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


async def _asked(call: Callable[[], Any]) -> Any:
    """Call a function of the program: a coroutine function on the loop, another one in a thread."""
    inner = call.func if isinstance(call, partial) else call
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None)):  # noqa: B004
        return await call()
    found = await asyncio.to_thread(call)
    return await found if inspect.isawaitable(found) else found
