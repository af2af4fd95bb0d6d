"""Threats 25 and 26: a crowd of connections that do nothing takes no payment, file or disk from anybody else."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.wire import connect, read_all
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

FILES = 128


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[System]:
    """A server that may open 128 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    running = System(tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    try:
        running.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with contextlib.ExitStack() as stack:
        stack.push(running)
        yield running


def test_a_crowd_of_connections_stops_nobody(few_files: System) -> None:
    """Connections beyond half of the files are closed at once; payments go on, and so does the store."""
    with httpx.Client(trust_env=False, timeout=10) as http, contextlib.ExitStack() as stack:
        v1 = V1(few_files.url, Payer(), http)
        assert v1.open(v1.payer.payment(100_000)).status_code == 201
        crowd = [stack.enter_context(connect(few_files.url)) for _ in range(2 * FILES)]
        assert [read_all(connection) for connection in crowd[-FILES:]] == [b""] * FILES
        assert [v1.pay(v1.payer.payment(100_000 + paid)).status_code for paid in range(1, 101)] == [200] * 100
        assert httpx.get(f"{few_files.management_url}/health", trust_env=False).status_code == 200
    assert few_files.server is not None
    log = few_files.server.text()
    assert "Too many open files" not in log
    assert log.count("all connections are taken") == 1


def test_a_crowd_that_leaves_makes_room(few_files: System) -> None:
    """Each connection that ends gives its place back, however often."""
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            for _ in range(FILES):
                stack.enter_context(connect(few_files.url))
        assert _served(few_files)


def _served(system: System) -> bool:
    """Ask on new connections until one is taken; the server may not have seen yet that others ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError), httpx.Client(trust_env=False, timeout=10) as http:
            return V1(system.url, Payer(), http).funding_info().status_code == 200
    return False


def test_clients_that_come_at_once_find_room(few_files: System) -> None:
    """400 connections that come before the server takes one wait in the kernel; none has to be sent again after a second."""
    with contextlib.ExitStack() as stack:
        assert few_files.server is not None
        few_files.server.process.send_signal(signal.SIGSTOP)
        stack.callback(few_files.server.process.send_signal, signal.SIGCONT)
        begun = time.monotonic()
        for _ in range(400):
            stack.enter_context(connect(few_files.url))
        assert time.monotonic() - begun < 1.0
