"""A socket that was handed to the event loop closes one descriptor, once, however early its connection ends."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import uvloop

from paychan.shared.handover import handed_over

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


class _Protocol(asyncio.Protocol):
    def __init__(self, *, ends: bool) -> None:
        self._ends, self.lost = ends, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        if self._ends:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.lost.set_result(None)


async def _accepted(protocol: _Protocol, connection: socket.socket) -> Any:
    return await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)


async def _connected(protocol: _Protocol, connection: socket.socket) -> Any:
    return await asyncio.get_running_loop().create_connection(lambda: protocol, sock=connection)


async def _unix(protocol: _Protocol, connection: socket.socket) -> Any:
    return await asyncio.get_running_loop().create_unix_connection(lambda: protocol, sock=connection)


Way = Callable[[_Protocol, socket.socket], Awaitable[Any]]


@pytest.fixture(params=LOOPS)
def runner(request: pytest.FixtureRequest) -> Any:
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield runner


def _pair(way: Way) -> tuple[socket.socket, socket.socket]:
    if way is _unix:
        pair = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            pair = listener.accept()[0], client
    pair[0].setblocking(False)
    return pair


def _assert_closed_once(number: int, connection: list[socket.socket]) -> None:
    """Give the number to a file, free the socket object, and see that the file is still open."""
    with suppress(OSError):
        os.fstat(number)
        pytest.fail("the connection's descriptor is still open")
    read_end, write_end = os.pipe()
    os.dup2(read_end, number)
    connection.clear()
    gc.collect()
    os.fstat(number)
    for each in {read_end, write_end, number}:
        os.close(each)


@pytest.mark.parametrize("way", [_accepted, _connected, _unix])
@pytest.mark.parametrize("ends", ["during the hand-over", "later"])
def test_a_connection_closes_its_descriptor_once(runner: asyncio.Runner, way: Way, ends: str) -> None:
    """If the connection ends before the hand-over returns, freeing the socket object must not close the number again."""
    connection, client = _pair(way)
    owned, number = [connection], connection.fileno()
    del connection

    async def use() -> None:
        protocol = _Protocol(ends=ends == "during the hand-over")
        with handed_over(owned[0]):
            await way(protocol, owned[0])
        client.close()
        await protocol.lost
        await asyncio.sleep(0.01)

    runner.run(use())
    _assert_closed_once(number, owned)


@pytest.mark.parametrize("way", [_accepted, _connected, _unix])
def test_a_hand_over_that_is_cancelled_closes_the_descriptor_once(runner: asyncio.Runner, way: Way) -> None:
    connection, client = _pair(way)
    owned, number = [connection], connection.fileno()
    del connection

    async def give() -> None:
        with handed_over(owned[0]):
            await way(_Protocol(ends=False), owned[0])

    async def use() -> None:
        task = asyncio.get_running_loop().create_task(give())
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        client.close()
        await asyncio.sleep(0.01)

    runner.run(use())
    _assert_closed_once(number, owned)
