"""A server that is stopped during a flood of requests ends in order and without error logs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest

from paychan.protocol.wire.payment_frames import write_payments
from tests.api.streams import masked, raw_stream, stream_url
from tests.api.wire import connect
from tests.lib.rbpcp import V2, Payer
from tests.lib.system import System

UNKNOWN = f"/v2/channels/{'0' * 64}/0?secret={'0' * 64}"
_SOON_SECONDS = 5.0
"""Half of the longest time that a stopping server waits for its requests."""

PAYMENT = b'{"payment_data":{"change_value":1,"signature_data":""},"application_data":""}'


def _request(method: str, where: str, body: bytes = b"") -> bytes:
    head = f"{method} {where} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


FLOODS: dict[str, Callable[[], bytes]] = {
    "no such resource": lambda: _request("GET", "/nowhere"),
    "payments to unknown channels": lambda: _request("PUT", UNKNOWN, PAYMENT),
    "v1 payments to unknown channels": lambda: _request("PUT", f"/v1/channels/{'1' * 64}/0?payment={'A' * 100}"),
    "terms": lambda: _request("GET", f"/v1/fundingInfo?client_pubkey={Payer().public_key.hex()}&exp_time=1900000000"),
    "streams of unknown channels": lambda: _request("GET", UNKNOWN.replace("?", "/stream?")),
    "half a body": lambda: _request("PUT", UNKNOWN, PAYMENT)[:-5],
    "half a head": lambda: b"GET /",
}


def _flood(url: str, content: Callable[[], bytes], stopped: threading.Event) -> None:
    while not stopped.is_set():
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            connections: list[socket.socket] = [stack.enter_context(connect(url)) for _ in range(20)]
            for connection in connections:
                connection.sendall(content() * 3)
            time.sleep(0.01)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "handlers"])
def test_fault_82_a_stop_during_floods_is_silent(tmp_path: Path, fast: bool) -> None:
    """During all floods at once SIGTERM ends the server with 0, without a traceback and without a pending coroutine."""
    stopped = threading.Event()
    with System(tmp_path, sections={"http": f"fast_lane = {str(fast).lower()}"}) as system:
        assert system.server is not None
        floods = [
            threading.Thread(target=_flood, args=(system.url, content, stopped), daemon=True)
            for content in FLOODS.values()
        ]
        for thread in floods:
            thread.start()
        try:
            time.sleep(1.0)
            assert system.server.stop() == 0
        finally:
            stopped.set()
            for thread in floods:
                thread.join(20)
        log = system.server.text().partition("event=serving")[2]  # before it, the signer may not be there yet
    assert "event=stopping" in log
    for word in ("Traceback", "never awaited", "Exception", "the store is closed", "level=error", "Task was destroyed"):
        assert word not in log, log[-5000:]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "handlers"])
def test_fault_82_a_stream_that_keeps_paying_does_not_delay_a_stop(
    tmp_path: Path, http: httpx.Client, fast: bool
) -> None:
    """The client never stops sending: the server ends soon, not only after its timeout for answers."""
    with System(tmp_path, sections={"http": f"fast_lane = {str(fast).lower()}"}) as system:
        assert system.server is not None
        client = V2(system.url, Payer(), http)
        payment = client.payer.payment(100_000)
        assert client.open(payment).status_code == 201
        with contextlib.closing(raw_stream(stream_url(client))) as connection:
            threads = [
                threading.Thread(target=work, args=(connection,), daemon=True)
                for work in (partial(_keep_sending, content=masked(0x82, write_payments([payment])) * 50), _take_all)
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            begun = time.monotonic()
            assert system.server.stop() == 0
            assert time.monotonic() - begun < _SOON_SECONDS
            for thread in threads:
                thread.join(20)


def _keep_sending(connection: socket.socket, content: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(content)


def _take_all(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass
