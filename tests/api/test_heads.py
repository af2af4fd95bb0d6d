"""Request heads over the limit are refused at the limit, before a parser or a fallback begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from paychan.api.budgets.head_limits import MOST_LINES, size_of_head
from paychan.protocol.errors import HeadTooLarge, RequestLineTooLong
from paychan.protocol.payment import encode_v1
from tests.api.wire import connect, read_all, statuses
from tests.lib.rbpcp import V1
from tests.lib.system import System

LIMIT = 8192
LINE = b"GET /v1/nowhere HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "handlers"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server with the fast path, and one without; both have a long head timeout."""
    http = f"fast_lane = {str(request.param).lower()}\nhead_seconds = 300"
    with System(tmp_path_factory.mktemp("either"), sections={"http": http}) as running:
        yield running


TOO_LARGE = {
    "one long header": (LINE + b"X: " + b"y" * LIMIT, 431, b"head_too_large"),
    "one long header of a payment": (b"PUT /v1/channels/a/0 HTTP/1.1\r\nX: " + b"y" * LIMIT, 431, b"head_too_large"),
    "a long line": (b"GET /" + b"y" * LIMIT, 414, b"request_line_too_long"),
    "a long line of a payment": (b"PUT /v1/channels/" + b"y" * LIMIT, 414, b"request_line_too_long"),
    "many headers": (LINE + b"a:\r\n" * MOST_LINES + b"\r\n", 431, b"head_too_large"),
    "many headers of a payment": (
        b"PUT /v1/channels/" + b"0" * 64 + b"/0?payment=a HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * MOST_LINES + b"\r\n",
        431,
        b"head_too_large",
    ),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_fault_78_a_large_head_is_refused_at_the_limit(either: System, kind: str) -> None:
    """The server refuses and closes after one byte over the limit, or one line too many."""
    content, status, code = TOO_LARGE[kind]
    with connect(either.url) as connection:
        connection.sendall(content[: LIMIT + 1])
        received = read_all(connection)

    assert statuses(received) == [status]
    assert code in received
    assert b"Connection: close\r\n" in received


def test_fault_78_a_large_head_is_refused_after_earlier_answers(open_v1: V1) -> None:
    """Earlier payments are answered first; requests after the large head are ignored."""
    path = open_v1.resource.removeprefix(open_v1.url)
    payment = encode_v1(open_v1.payer.payment(100_001))
    with connect(open_v1.url) as connection:
        connection.sendall(f"PUT {path}?payment={payment} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        connection.sendall(LINE + b"X: " + b"y" * 9 * LIMIT + b"\r\n\r\n" + LINE + b"\r\n")
        received = read_all(connection)

    assert statuses(received) == [200, 431]


def test_fault_78_the_largest_head_is_read(either: System) -> None:
    """A head at the limit of bytes and lines is served, in pieces of any size."""
    lines = LINE + b"a: b\r\n" * (MOST_LINES - 1)
    largest = lines[:-2] + b"y" * (LIMIT - len(lines) - 2) + b"\r\n\r\n"
    assert len(largest) == LIMIT
    with connect(either.url) as connection:
        for piece in (largest[:10], largest[10:100], largest[100:]):
            connection.sendall(piece)
        assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")


def test_fault_78_a_fallback_begins_only_with_a_complete_head(system: System) -> None:
    """A fallback needs a second descriptor: a client with an incomplete head uses only one."""
    assert system.server is not None
    files = Path(f"/proc/{system.server.process.pid}/fd")
    with contextlib.ExitStack() as stack:
        before = len(list(files.iterdir()))
        connections = [stack.enter_context(connect(system.url)) for _ in range(40)]
        for connection in connections:
            connection.sendall(LINE)
        with connect(system.url) as last:  # served after all requests before it
            last.sendall(LINE + b"\r\n")
            assert last.recv(4096).startswith(b"HTTP/1.1 404 ")
        assert len(list(files.iterdir())) < before + 60
        connections[0].sendall(b"\r\n")
        assert connections[0].recv(4096).startswith(b"HTTP/1.1 404 ")


def test_the_size_of_a_head() -> None:
    """A head ends at the first empty line, with or without CR; the limits do not apply to the bytes after it."""
    assert size_of_head(b"", 100) == size_of_head(LINE, 100) == size_of_head(b"y" * 100, 100) == 0
    assert size_of_head(LINE + b"\r\n" + b"y" * 100, 100) == len(LINE) + 2
    assert size_of_head(b"GET / HTTP/1.1\n\nX\r\n\r\n", 100) == 16
    assert size_of_head(LINE + b"\r\n" + b"\n" * 500, 100) == len(LINE) + 2
    with pytest.raises(RequestLineTooLong):
        size_of_head(b"y" * 101, 100)
    with pytest.raises(HeadTooLarge):
        size_of_head(LINE + b"y" * 100, 100)
    with pytest.raises(HeadTooLarge):
        size_of_head(b"\n" + b"a:\n" * (MOST_LINES + 2), 1000)
