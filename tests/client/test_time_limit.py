"""The time that one call may take, against servers that accept a connection and then are silent, slow or busy."""

from __future__ import annotations

import contextlib
import inspect
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paychan.client import AsyncPayer, ClientError, Payer, ServerFailed, Unreachable
from tests.client.conftest import OpenChannel
from tests.client.liar import OPEN_PRICE_SAT, Liar, Lie

LIMIT_SECONDS = 1.0
SLACK_SECONDS = 5.0
"""A machine under load is late; without a limit each of these calls would take more than twenty seconds."""


@contextmanager
def quickly() -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < LIMIT_SECONDS + SLACK_SECONDS


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads nothing and does `answer` with each connection; its URL."""
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            answer(connection)
            ended.wait(60)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        ended.set()


def silent(_: socket.socket) -> None:
    pass


def slow(connection: socket.socket) -> None:
    """Send a body byte by byte: httpx counts its time anew for each part."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.1)


def busy(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 503 Busy\r\nRetry-After: 20\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(("behaviour", "error"), [(silent, Unreachable), (slow, Unreachable), (busy, ServerFailed)])
def test_fault_51_a_new_channel_takes_no_longer_than_the_limit(
    tmp_path: Path, behaviour: Callable[[socket.socket], None], error: type[ClientError]
) -> None:
    """Silence, a trickle and a long Retry-After end at the limit, with the error of the last answer."""
    with (
        server(behaviour) as url,
        Payer(url, wallet=tmp_path, time_limit_seconds=LIMIT_SECONDS) as payer,
        quickly(),
        pytest.raises(error),
    ):
        payer.new_channel(hours=100)


@pytest.mark.parametrize(("behaviour", "error"), [(silent, Unreachable), (slow, Unreachable), (busy, ServerFailed)])
async def test_fault_51_the_same_on_an_event_loop(
    tmp_path: Path, behaviour: Callable[[socket.socket], None], error: type[ClientError]
) -> None:
    """A coroutine's time ends the same way."""
    with server(behaviour) as url:
        async with AsyncPayer(url, wallet=tmp_path, time_limit_seconds=LIMIT_SECONDS) as payer:
            with quickly(), pytest.raises(error):
                await payer.new_channel(hours=100)


def test_fault_51_every_call_of_a_channel_has_the_limit(liar: Liar, funded: OpenChannel) -> None:
    """A silent server holds up neither opening nor paying nor closing; each goes on when the server answers again."""
    channel = funded(time_limit_seconds=LIMIT_SECONDS)
    for call in (channel.open, lambda: channel.pay(100), channel.status, channel.close):
        liar.lies.append(Lie(deaf=True, seconds=20.0))
        with quickly(), pytest.raises(Unreachable, match="time limit of 1 s"):
            call()
        if call == channel.open:
            channel.open()
    assert liar.received_sat == OPEN_PRICE_SAT
    channel.close()


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_fault_51_a_limit_is_more_than_nothing(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="time limit"):
        Payer(wallet=tmp_path, time_limit_seconds=seconds)


def test_fault_51_all_settings_are_in_the_help() -> None:
    """`help(Payer)` shows every setting with its type and meaning."""
    for kind in (Payer, AsyncPayer):
        names = list(inspect.signature(kind).parameters)
        assert not [each for each in inspect.signature(kind).parameters.values() if each.kind is each.VAR_KEYWORD]
        assert {"wallet", "limits", "patience", "time_limit_seconds", "network", "http"} <= set(names)
        for name in names:
            assert f"{name}:" in (Payer.__doc__ or "")
