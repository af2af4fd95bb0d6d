"""A server that is stopped while strangers flood it ends in order and in silence."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.api.wire import connect
from tests.lib.rbpcp import Payer
from tests.lib.system import System

UNKNOWN = f"/v2/channels/{'0' * 64}/0?secret={'0' * 64}"
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


@pytest.mark.parametrize("lane", [True, False], ids=["lane", "handlers"])
def test_fault_82_a_stop_during_floods_is_silent(tmp_path: Path, lane: bool) -> None:
    """With all floods at once SIGTERM ends the server with 0, without a traceback and without a coroutine left over."""
    stopped = threading.Event()
    with System(tmp_path, sections={"http": f"fast_lane = {str(lane).lower()}"}) as system:
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
        log = system.server.text()
    assert "event=stopping" in log
    for word in ("Traceback", "never awaited", "Exception", "the store is closed", "level=error", "Task was destroyed"):
        assert word not in log, log[-5000:]
