"""The request that begins a stream, byte by byte: where it ends, who may send it, and what follows it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest

from paychan.protocol.wire.payment_frames import write_payments
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.both_paths import BOTH_PATHS
from tests.api.streams import close_code, masked, raw_stream, stream_url, upgrade
from tests.api.wire import connect, exchange, read_all, statuses
from tests.lib.application import Application, Reply, yes
from tests.lib.rbpcp import V2, Payer
from tests.lib.system import System

_BURST_BYTES = 200_000
_FLOOD_BYTES = 64_000_000
"""Far more than the buffers of both sockets hold."""

UNKNOWN = b"PUT /v1/channels/%b/0?payment=%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"1" * 64, b"A" * 100)
LAST = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def open_s(system: System, http: httpx.Client) -> V2:
    """Open a channel in one dialect, as the upgrade is the same for both."""
    return opened(system, http)


def opened(system: System, http: httpx.Client) -> V2:
    client = V2(system.url, Payer(), http, Dialect.S)
    assert client.open(client.payer.payment(100_000)).status_code == 201
    return client


def asks(client: V2, *headers: str, secret: str | None = None) -> bytes:
    return upgrade(stream_url(client, secret), *headers)


def first_line(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n" not in received:
        received += connection.recv(1) or b"\r\n"
    return received


# --- the head -------------------------------------------------------------------------------------------------------


@BOTH_PATHS
def test_fault_78_the_head_of_an_upgrade_ends_at_the_first_empty_line(open_s: V2) -> None:
    """Lines may end without CR; what follows the first empty line is no part of the head."""
    head = asks(open_s)
    line, host, fields = head.split(b"\r\n", 2)
    received = exchange(open_s.url, line + b"\r\n" + host + b"\n\n" + LAST + fields)

    assert statuses(received) == [400, 404]


@BOTH_PATHS
@pytest.mark.parametrize("host", ["pay_chan:8080", "pay~chan", "[::1]:80", "[fe80::1%25eth0]", "xn--4gbrim.example."])
def test_each_name_of_a_host_may_begin_a_stream(open_s: V2, host: str) -> None:
    """A name of a container may have an underscore."""
    request = asks(open_s).replace(b"Host: " + stream_url(open_s).split("/")[2].encode(), b"Host: " + host.encode())
    with connect(open_s.url) as connection:
        connection.sendall(request)

        assert first_line(connection).startswith(b"HTTP/1.1 101 ")


@BOTH_PATHS
def test_a_length_of_0_is_no_body(open_s: V2) -> None:
    """Some proxies add `Content-Length: 0` to every request without a body."""
    with closing(raw_stream(stream_url(open_s), "Content-Length: 0")) as stream:
        stream.sendall(masked(0x82, write_payments([open_s.payer.payment(100_001)])))

        assert stream.recv(2) == b"\x82\x12"


# --- what follows ---------------------------------------------------------------------------------------------------


@BOTH_PATHS
def test_requests_behind_a_refused_upgrade_are_answered(open_s: V2) -> None:
    """The connection continues with HTTP; every answer is in its place."""
    path = "/" + open_s.resource("").split("/", 3)[3]
    body = open_s.body(open_s.payer.payment(100_003))
    payment = b"PUT %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
    refused = asks(open_s, secret="0" * 64)
    received = exchange(open_s.url, payment + refused + payment + refused + refused + LAST)

    assert statuses(received) == [200, 404, 200, 404, 404, 404]


@BOTH_PATHS
def test_a_refused_upgrade_closes_if_the_client_wants_that(open_s: V2) -> None:
    request = asks(open_s, secret="0" * 64).replace(b"Connection: Upgrade", b"Connection: Upgrade, close")
    received = exchange(open_s.url, request + LAST)

    assert statuses(received) == [404]
    assert b"Connection: close\r\n" in received


@BOTH_PATHS
@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE"])
def test_only_get_begins_a_stream(open_s: V2, method: str) -> None:
    received = exchange(open_s.url, asks(open_s).replace(b"GET", method.encode(), 1) + LAST)

    assert statuses(received)[:1] == [405]


@BOTH_PATHS
def test_fault_60_a_stream_that_began_with_many_frames_is_read_in_turns(open_s: V2) -> None:
    """Frames that arrive with the upgrade fill the stream's buffer once; then the kernel holds back the client."""
    again = masked(0x82, write_payments([open_s.payer.payment(100_000)]))  # of no value: few are judged in a second
    with connect(open_s.url) as connection:
        connection.sendall(UNKNOWN * 6)  # each delays its connection longer: what follows waits in the kernel
        time.sleep(0.1)
        frames = again * (_BURST_BYTES // len(again))
        connection.sendall(asks(open_s) + frames)
        connection.settimeout(3)
        sent = 0
        with suppress(TimeoutError, ConnectionError):
            while sent < _FLOOD_BYTES:
                connection.sendall(frames)
                sent += len(frames)
    assert sent < _FLOOD_BYTES


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "handlers"])
def test_fault_82_a_stream_that_begins_during_the_stop_is_told(tmp_path: Path, http: httpx.Client, fast: bool) -> None:
    """While a stopping server waits for a payment, an upgrade is not called malformed: the stream closes with 1001."""
    asked, answers = threading.Event(), threading.Event()

    def answer(_: object) -> Reply:
        asked.set()
        answers.wait(20)
        return yes()

    with Application() as application:
        sections = {
            "callback": f'url = "{application.url}"\ntimeout_seconds = 10',
            "http": f"fast_lane = {str(fast).lower()}",
        }
        with System(tmp_path, sections=sections) as system:
            client = opened(system, http)
            application.answer = answer
            late = connect(system.url)
            late.sendall(UNKNOWN)
            received = late.recv(1)
            with raw_stream(stream_url(client)) as stream:
                stream.sendall(masked(0x82, write_payments([client.payer.payment(100_001)])))
                assert asked.wait(20)
                assert system.server is not None
                system.server.process.terminate()
                while "event=stopping" not in system.server.text():
                    time.sleep(0.01)
                late.sendall(asks(client))
                while received.count(b"HTTP/1.1 ") < 2 and (more := late.recv(65536)):
                    received += more
                answers.set()
                assert close_code(stream) == 1001
            received += read_all(late)
            assert system.server.process.wait(20) == 0
    assert b"HTTP/1.1 101 " in received
    assert received.endswith(b"\x88\x0e\x03\xe9server stops")


def test_a_stream_over_ipv6(tmp_path: Path, http: httpx.Client) -> None:
    """The server names its address in brackets, and a stream begins there."""
    with System(tmp_path, sections={"http": 'listen = "::1"', "management": 'listen = "::1"'}) as system:
        client = opened(system, http)
        with raw_stream(stream_url(client)) as stream:
            stream.sendall(masked(0x82, write_payments([client.payer.payment(100_001)])))

            assert stream.recv(2) == b"\x82\x12"
        assert system.manage("GET", "/health").status_code == 200
