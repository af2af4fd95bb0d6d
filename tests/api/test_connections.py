"""Threats 25 and 26: many idle connections must not block payments, use up descriptors, or fill the disk."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from paychan.protocol.payment import encode_v1
from tests.api.wire import connect, read_all
from tests.lib.customer import wait_for
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

FILES = 256


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "handlers"])
def few_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server that may open 256 files and has long timeouts for idle clients."""
    http = f"fast_lane = {str(request.param).lower()}\nidle_seconds = 600\nhead_seconds = 300"
    directory = tmp_path_factory.mktemp("few")
    with System(directory, sections={"http": http}, limits={resource.RLIMIT_NOFILE: FILES}) as running:
        yield running


def _open(system: System, http: httpx.Client) -> V1:
    v1 = V1(system.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201
    return v1


def _log(system: System) -> str:
    assert system.server is not None
    return system.server.text()


def _open_files(system: System) -> int:
    assert system.server is not None
    return len(list(Path(f"/proc/{system.server.process.pid}/fd").iterdir()))


def test_fault_66_idle_connections_keep_no_client_out(few_files: System) -> None:
    """With more idle connections than slots, new clients, payers and the operator are still served."""
    with httpx.Client(trust_env=False, timeout=10, verify=False) as http, contextlib.ExitStack() as stack:
        v1 = _open(few_files, http)
        for _ in range(2 * FILES):
            stack.enter_context(connect(few_files.url))
        before = _local_port(http)
        for _ in range(5):
            with httpx.Client(trust_env=False, timeout=10, verify=False) as newcomer:
                _open(few_files, newcomer)
        assert [v1.pay(v1.payer.payment(100_000 + paid)).status_code for paid in range(1, 101)] == [200] * 100
        assert _local_port(http) == before, "the payer's connection was closed"
        assert httpx.get(f"{few_files.management_url}/health", trust_env=False, verify=False).status_code == 200
    assert "Too many open files" not in _log(few_files)
    assert _log(few_files).count("all connection slots are in use") == 1


@pytest.mark.parametrize("few_files", [False], indirect=True, ids=["handlers"])
def test_fault_66_requests_of_a_client_that_left_are_not_served(few_files: System) -> None:
    """A client sends many requests at once and disconnects: requests that have not begun are dropped."""
    number = 150
    with httpx.Client(trust_env=False, timeout=10, verify=False) as http:
        v1 = _open(few_files, http)
        payer, where = v1.payer, v1.resource.removeprefix(v1.url)
        texts = [encode_v1(payer.payment(100_000 + paid)) for paid in range(1, number + 1)]
        with connect(few_files.url) as connection:
            connection.sendall(b"".join(f"PUT {where}?payment={t} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for t in texts))
            assert connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(1.0)
        answer = v1.pay(payer.payment(100_000 + number))
    assert answer.json()["value_received"] > 0, "the last of them was served"


def _local_port(http: httpx.Client) -> list[str]:
    pool = http._transport._pool  # type: ignore[attr-defined]
    return [repr(id(each)) for each in pool.connections]


def test_fault_70_all_listeners_together_stay_below_the_limit(few_files: System) -> None:
    """Many connections on both listeners, also with requests that are not payments, leave descriptors free."""
    # Tornado, which has a descriptor of its own, answers 100 and waits for the body
    head = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for url, content in ((few_files.url, head), (few_files.management_url, head), (few_files.url, b"")):
            for _ in range(FILES):
                connection = stack.enter_context(connect(url))
                with contextlib.suppress(OSError):
                    connection.sendall(content)
        with httpx.Client(trust_env=False, timeout=10, verify=False) as http:
            _open(few_files, http)
        assert httpx.get(f"{few_files.management_url}/health", trust_env=False, verify=False).status_code == 200
        assert _open_files(few_files) < FILES - 16
    assert "Too many open files" not in _log(few_files)


def test_fault_66_slow_heads_make_room(few_files: System) -> None:
    """Connections that send a head byte by byte are closed like idle ones when a new client needs a slot."""
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connect(few_files.url)) for _ in range(FILES)]
        for piece in (b"PUT /v1/channels/", b"00"):
            for connection in crowd:
                with contextlib.suppress(OSError):
                    connection.sendall(piece)
            with httpx.Client(trust_env=False, timeout=10, verify=False) as http:
                _open(few_files, http)


def test_connections_that_end_free_their_slots(few_files: System) -> None:
    """Each connection that ends frees its slot, also after many rounds."""
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            for _ in range(FILES):
                stack.enter_context(connect(few_files.url))
    with httpx.Client(trust_env=False, timeout=10, verify=False) as http:
        _open(few_files, http)


def test_clients_that_connect_at_once_wait_in_the_kernel(few_files: System) -> None:
    """400 connections that arrive before the server accepts one wait in the kernel.

    No SYN is repeated after a second.
    """
    with contextlib.ExitStack() as stack:
        assert few_files.server is not None
        few_files.server.process.send_signal(signal.SIGSTOP)
        stack.callback(few_files.server.process.send_signal, signal.SIGCONT)
        begun = time.monotonic()
        for _ in range(400):
            stack.enter_context(connect(few_files.url))
        assert time.monotonic() - begun < 1.0


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "handlers"])
def test_fault_31_the_soft_limit_is_raised_and_named(tmp_path: Path, fast: bool) -> None:
    """A soft limit below the hard one is raised; each client connection counts two descriptors of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with System(tmp_path, sections={"http": f"fast_lane = {str(fast).lower()}"}) as running:
            found = re.search(r"event=files limit=(\d+) clients=(\d+) management=(\d+)", _log(running))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found is not None
    limit, clients, management = map(int, found.groups())
    assert limit >= min(hard, 1 << 20) or hard == resource.RLIM_INFINITY
    assert 2 * clients + management < limit


def test_fault_31_a_limit_that_leaves_nothing_stops_the_start(tmp_path: Path) -> None:
    """If the limit leaves no descriptors for clients, the start fails with both numbers."""
    with (
        pytest.raises(AssertionError, match=r"may open 100 files, and needs at least \d+"),
        System(tmp_path, limits={resource.RLIMIT_NOFILE: 100}),
    ):
        pass


def test_fault_70_without_a_free_descriptor_accepting_pauses(tmp_path: Path) -> None:
    """If no descriptor is free, accepting pauses without a busy loop, logs it once, and resumes when one is free."""
    with System(tmp_path) as running, contextlib.ExitStack() as stack:
        assert running.server is not None
        process = running.server.process.pid
        with httpx.Client(trust_env=False, timeout=10, verify=False) as http:
            v1 = _open(running, http)
            former = resource.prlimit(process, resource.RLIMIT_NOFILE)
            resource.prlimit(process, resource.RLIMIT_NOFILE, (_open_files(running), former[1]))
            for url in (running.url, running.management_url):
                for _ in range(20):
                    stack.enter_context(connect(url))
            wait_for(lambda: "can't accept" in _log(running), "the line in the log")
            before, begun = _processor_seconds(process), time.monotonic()
            while time.monotonic() - begun < 1.0:
                time.sleep(0.1)
            assert _processor_seconds(process) - before < 0.5
            assert v1.pay(v1.payer.payment(100_001)).status_code == 200  # it is connected already
            assert _log(running).count("can't accept") <= 2
            assert "Traceback" not in _log(running)
            resource.prlimit(process, resource.RLIMIT_NOFILE, former)
        with httpx.Client(trust_env=False, timeout=10, verify=False) as http:
            _open(running, http)
        assert httpx.get(f"{running.management_url}/health", trust_env=False, verify=False).status_code == 200


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _says_nothing(connection: socket.socket) -> None:
    """Connect and send nothing."""


def _drips(connection: socket.socket) -> None:
    """Send a head byte by byte, without end."""
    with contextlib.suppress(OSError):
        connection.sendall(b"G")


def _pays_then_drips(connection: socket.socket) -> None:
    """Send one complete request, then a second one byte by byte, without end."""
    with contextlib.suppress(OSError):
        connection.sendall(b"P")


@pytest.mark.parametrize("does", [_says_nothing, _drips])
def test_fault_66_a_first_request_has_seconds(hasty: System, does: Callable[[socket.socket], None]) -> None:
    """A connection without a complete first head is closed after `head_seconds`, also if bytes keep arriving."""
    with connect(hasty.url) as connection:
        connection.settimeout(0.2)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            does(connection)
            with contextlib.suppress(TimeoutError):
                assert read_all(connection) == b""
                return
    pytest.fail("still open")


def test_fault_66_a_later_request_has_seconds_too(hasty: System) -> None:
    """After an answered payment a connection may idle, but a started head must be complete within `head_seconds`."""
    with httpx.Client(trust_env=False, timeout=10, verify=False) as http:
        v1 = _open(hasty, http)
    pay = f"PUT {v1.resource.removeprefix(v1.url)}?payment=AAAA HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with connect(hasty.url) as idle, connect(hasty.url) as drips:
        for connection in (idle, drips):
            connection.sendall(pay)
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
        drips.settimeout(0.2)
        deadline, closed = time.monotonic() + 20, False
        while not closed and time.monotonic() < deadline:
            _pays_then_drips(drips)
            with contextlib.suppress(TimeoutError):
                closed = read_all(drips) == b""
        assert closed
        idle.sendall(pay)
        assert idle.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server with a head timeout of one second."""
    with System(tmp_path_factory.mktemp("hasty"), sections={"http": "head_seconds = 1"}) as running:
        yield running
