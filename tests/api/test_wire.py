"""Threats 26 and 28: limits of a connection, and bytes on which HTTP parsers disagree.

The server has short timeouts, so that the tests see connections end.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator, Sequence

import httpx
import pytest

from paychan.protocol.payment import encode_v1
from tests.api.wire import PATIENCE_SECONDS, connect, exchange, read_all, statuses
from tests.lib.looped import looped
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

HOST = b"Host: localhost\r\n"
PAST = b"/v1/fundingInfo?exp_time=1500000000&client_pubkey=" + Payer().public_key.hex().encode()
GET = b"GET " + PAST + b" HTTP/1.1\r\n" + HOST
POST = b"POST /v1/channels/new HTTP/1.1\r\n" + HOST
SMUGGLED = GET + b"\r\n"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    sections = {"http": "idle_seconds = 1\nhead_seconds = 1\nbody_seconds = 1", "open": "min_confirmations = 1"}
    with System(tmp_path_factory.mktemp("strict"), sections=sections) as running:
        yield running


# --- many requests on one connection --------------------------------------------------------------------------------


def test_one_connection_serves_many_requests(open_v1: V1) -> None:
    """Keep-alive: 200 payments go over one connection, as the benchmark client of the original needs."""
    payments = [encode_v1(open_v1.payer.payment(100_000 + paid)) for paid in range(1, 201)]
    path = open_v1.resource.removeprefix(open_v1.url)
    with connect(open_v1.url) as connection:
        answers = connection.makefile("rb")
        for payment in payments:
            connection.sendall(
                f"PUT {path}?payment={payment} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
            )
            assert answers.readline() == b"HTTP/1.1 200 Payment accepted\r\n"
            head = b"".join(iter(answers.readline, b"\r\n"))
            size = re.search(rb"Content-Length: (\d+)", head)
            assert size is not None
            assert b'"value_received":1,' in answers.read(int(size[1]))
        answers.close()


def test_pipelined_requests_are_answered_in_order(open_v1: V1) -> None:
    """200 payments that are sent without waiting, more than any buffer holds, are answered in order."""
    path = open_v1.resource.removeprefix(open_v1.url)
    payments = [open_v1.payer.payment(100_000 + paid * paid) for paid in range(1, 201)]
    requests = [f"PUT {path}?payment={encode_v1(payment)} HTTP/1.1\r\nHost: x\r\n\r\n" for payment in payments]
    padding = "X-Padding: " + "x" * 1000 + "\r\n\r\n"
    content = "".join(request.removesuffix("\r\n") + padding for request in requests)
    received = exchange(open_v1.url, content.encode(), GET + b"Connection: close\r\n\r\n")
    assert statuses(received) == [200] * 201
    left = [f'"channel_value_left":{payment.change_sat},'.encode() for payment in payments]
    places = [received.index(text) for text in left]
    assert places == sorted(places)


def test_http_1_0_and_connection_close_end_the_connection(strict: System) -> None:
    """A client that does not keep the connection alive gets one complete answer, then the close."""
    for request in (b"GET " + PAST + b" HTTP/1.0\r\n\r\n", GET + b"Connection: close\r\n\r\n"):
        received = exchange(strict.url, request)
        assert statuses(received) == [200]
        assert received.endswith(b"}\n")


# --- time and size --------------------------------------------------------------------------------------------------


def test_an_idle_connection_is_closed(strict: System) -> None:
    """A client that stops sending, before, within or after a request, is disconnected after the timeout."""
    begun = (b"", b"GET / HTT", GET, GET + b"X: " + b"y" * 500, SMUGGLED)
    assert [statuses(received) for received in _received(strict, begun)] == [[], [], [], [], [200]]


def test_threat_26_an_incomplete_body_times_out(strict: System) -> None:
    """A body must be complete within its timeout; half a body gets no answer."""
    framings = (b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n64\r\n")
    assert _received(strict, [POST + framing + b"half" for framing in framings]) == [b"", b""]


def _received(system: System, begun: Sequence[bytes]) -> list[bytes]:
    """Send bytes on several connections; return what each received until the server closed it."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(system.url)) for _ in begun]
        for connection, content in zip(connections, begun, strict=True):
            connection.sendall(content)
        return [read_all(connection) for connection in connections]


def test_threat_26_slow_headers_do_not_keep_a_connection_open(strict: System) -> None:
    """Slowloris: single bytes do not extend the timeout of a head."""
    with connect(strict.url) as connection, pytest.raises(OSError):
        _trickle(connection)


def _trickle(connection: socket.socket) -> None:
    for _ in range(100):
        connection.sendall(b"X")
        time.sleep(0.1)


def test_threat_26_a_client_that_reads_no_answers_is_disconnected(strict: System) -> None:
    """A client that pipelines requests and reads nothing is disconnected, and most answers are never made."""
    with connect(strict.url) as connection:
        connection.settimeout(0.5)
        sent = 0
        with contextlib.suppress(OSError):  # the buffers are full, or the server has closed the connection
            while True:
                connection.sendall(SMUGGLED * 100)
                sent += 100
        time.sleep(3)
        connection.settimeout(PATIENCE_SECONDS)
        assert len(statuses(read_all(connection))) < sent


def test_threat_26_a_head_over_the_limit_ends_the_connection(strict: System) -> None:
    """A head of at most 8192 bytes is read; a longer one, also an endless one, ends the connection."""
    fits = GET + b"Connection: close\r\nX: " + b"x" * (8192 - len(GET) - 26) + b"\r\n\r\n"
    assert len(fits) == 8192
    assert statuses(exchange(strict.url, fits)) == [200]
    for long in (fits.replace(b"X: ", b"X: xx"), GET + b"X: " + b"x" * 60_000):
        assert 200 not in statuses(exchange(strict.url, long))


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 1000000000000\r\n\r\n" + b"x" * 1000,
        POST + b"Content-Length: 65537\r\n\r\n" + b"x" * 1000,
        POST + b"Transfer-Encoding: chunked\r\n\r\n10001\r\n" + b"x" * 1000,
        POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + b"x" * 1000,
    ],
    ids=["a terabyte", "65537 bytes", "chunk of 65537 bytes", "chunk of 2^64-1 bytes"],
)
def test_threat_26_a_body_far_over_the_limit_is_not_read(strict: System, request_bytes: bytes) -> None:
    """A body above sixteen times the limit is not read: 400 at once, and the connection is closed."""
    assert statuses(exchange(strict.url, request_bytes)) == [400]


def test_many_small_chunks_make_one_body(open_v1: V1) -> None:
    """A body in chunks of one byte is read as a whole."""
    path = open_v1.resource.removeprefix(open_v1.url).encode()
    request = b"PUT " + path + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    for count, status in ((4096, 400), (4097, 413)):
        received = exchange(open_v1.url, request + b"1\r\nx\r\n" * count + b"0\r\n\r\n")
        assert statuses(received) == [status]


# --- bytes on which parsers disagree --------------------------------------------------------------------------------

HIDDEN = b"0\r\n\r\n" + SMUGGLED

CORPUS = {
    "CL and TE": POST + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "TE and CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + HIDDEN,
    "TE twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + HIDDEN,
    "TE identity": POST + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\n" + HIDDEN,
    "TE list": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + HIDDEN,
    "TE x": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + HIDDEN,
    "TE comma": POST + b"Transfer-Encoding: ,chunked\r\n\r\n" + HIDDEN,
    "TE vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + HIDDEN,
    "TE space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + HIDDEN,
    "TE quoted": POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + HIDDEN,
    "TE after obs-fold": POST + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n" + HIDDEN,
    "TE hidden in obs-fold": POST
    + b"X: y\r\n Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN)
    + HIDDEN,
    "TE behind bare CR": POST
    + b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN)
    + HIDDEN,
    "TE behind NUL": POST + b"X: y\x00\r\nTransfer-Encoding: chunked\x00\r\n\r\n" + HIDDEN,
    "TE in the first line's fold": b"POST / HTTP/1.1\r\n Transfer-Encoding: chunked\r\n" + HOST + b"\r\n" + HIDDEN,
    "two CL": POST + b"Content-Length: 5\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "CL list": POST + b"Content-Length: 5, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "CL plus": POST + b"Content-Length: +5\r\n\r\n" + HIDDEN,
    "CL minus": POST + b"Content-Length: -5\r\n\r\n" + HIDDEN,
    "CL hex": POST + b"Content-Length: 0x5\r\n\r\n" + HIDDEN,
    "CL underscore": POST + b"Content-Length: 0_5\r\n\r\n" + HIDDEN,
    "CL fraction": POST + b"Content-Length: 5.0\r\n\r\n" + HIDDEN,
    "CL empty": POST + b"Content-Length:\r\n\r\n" + HIDDEN,
    "CL superscript": POST + b"Content-Length: \xb2\r\n\r\n" + HIDDEN,
    "CL space before colon": POST + b"Content-Length : 5\r\n\r\n" + HIDDEN,
    "CL of 5000 digits": POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + HIDDEN,
    "chunk size hex prefix": POST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + SMUGGLED,
    "chunk size minus": POST + b"Transfer-Encoding: chunked\r\n\r\n-0\r\n\r\n" + SMUGGLED,
    "chunk size plus": POST + b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + SMUGGLED,
    "chunk size underscore": POST + b"Transfer-Encoding: chunked\r\n\r\n0_0\r\n\r\n" + SMUGGLED,
    "chunk size space": POST + b"Transfer-Encoding: chunked\r\n\r\n 0\r\n\r\n" + SMUGGLED,
    "chunk size empty": POST + b"Transfer-Encoding: chunked\r\n\r\n\r\n\r\n" + SMUGGLED,
    "chunk extension": POST + b"Transfer-Encoding: chunked\r\n\r\n0;x=\ny\r\n\r\n" + SMUGGLED,
    "chunk behind bare LF": POST + b"Transfer-Encoding: chunked\r\n\r\n1\nx\n0\n\n" + SMUGGLED,
    "chunk too long": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxx0\r\n\r\n" + SMUGGLED,
    "trailer": POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n" + SMUGGLED,
    "no Host": b"GET " + PAST + b" HTTP/1.1\r\n\r\n" + SMUGGLED,
    "two Hosts": GET + b"Host: evil.example\r\n\r\n" + SMUGGLED,
    "Host list": b"GET " + PAST + b" HTTP/1.1\r\nHost: a,b\r\n\r\n" + SMUGGLED,
    "header without colon": GET + b"Hello\r\n\r\n" + SMUGGLED,
    "header without name": GET + b": hello\r\n\r\n" + SMUGGLED,
    "header with space": GET + b"X Y: z\r\n\r\n" + SMUGGLED,
    "header with NUL": GET + b"X: \x00\r\n\r\n" + SMUGGLED,
    "header with bare CR": GET + b"X: a\rb\r\n\r\n" + SMUGGLED,
    "obs-fold": GET + b"X: a\r\n b\r\n\r\n" + SMUGGLED,
    "first header folded": b"GET " + PAST + b" HTTP/1.1\r\n X: y\r\n" + HOST + b"\r\n" + SMUGGLED,
    "two spaces": b"GET  " + PAST + b" HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED,
    "tab for space": b"GET\t" + PAST + b" HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED,
    "no version": b"GET " + PAST + b"\r\n" + HOST + b"\r\n" + SMUGGLED,
    "HTTP/0.9": b"GET " + PAST + b" HTTP/0.9\r\n" + HOST + b"\r\n" + SMUGGLED,
    "HTTP/2.0": b"GET " + PAST + b" HTTP/2.0\r\n" + HOST + b"\r\n" + SMUGGLED,
    "HTTP/1.10": b"GET " + PAST + b" HTTP/1.10\r\n" + HOST + b"\r\n" + SMUGGLED,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n" + SMUGGLED,
    "space in target": b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED,
    "NUL in target": b"GET /\x00 HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED,
    "a thousand fields": b"GET /?" + b"&" * 1001 + b" HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED,
}


@pytest.mark.parametrize("as_payment", [False, True])
@looped("kind", CORPUS)
def test_threat_28_an_ambiguous_request_hides_no_second_one(strict: System, kind: str, as_payment: bool) -> None:
    """A request that two parsers may read differently gets at most one 4xx, then the connection is closed.

    Payments take the fast path, which has its own parser, so each request is also sent as a payment.
    """
    content = CORPUS[kind]
    if as_payment:
        content = re.sub(
            rb"\A(?:GET|POST)(\s+)/[^ ?\0]*", rb"PUT\1/v1/channels/" + b"0" * 64 + b"/0?payment=AAAA", content
        )
    assert statuses(exchange(strict.url, content)) in ([], [400])


CLEAR = {
    "bare LF": (b"GET " + PAST + b" HTTP/1.1\nHost: x\n\n", 200),
    "an empty line before": (b"\r\n" + SMUGGLED, 200),
    "equal CL": (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    "body on GET": (GET + b"Content-Length: 5\r\n\r\nhello", 200),
    "absolute target": (b"GET http://evil.example" + PAST + b" HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    "authority": (b"CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "expectation": (POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello", 400),
    "upgrade": (GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200),
}


@looped("kind", CLEAR)
def test_threat_28_an_unusual_but_clear_request_is_one_request(strict: System, kind: str) -> None:
    """An unusual request with only one meaning is read as exactly one request, and the next request follows it."""
    first, status = CLEAR[kind]
    last = b"GET /last HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    assert statuses(exchange(strict.url, first + last)) == [status, 404]


def test_a_client_that_disconnects_at_once_disturbs_no_other(strict: System, http: httpx.Client) -> None:
    """Connections that are closed while an answer is pending cause no error in the server."""
    v1 = V1(strict.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201
    path = v1.resource.removeprefix(v1.url)
    for number in range(50):
        payment = encode_v1(v1.payer.payment(100_001 + number))
        with connect(strict.url) as connection:
            connection.sendall(SMUGGLED * 5 + f"PUT {path}?payment={payment} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        with connect(strict.url) as connection:
            connection.sendall(f"PUT {path}?payment={payment} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert strict.server is not None
    answer = http.get(f"{strict.url}/v1/fundingInfo?exp_time=1500000000&client_pubkey={Payer().public_key.hex()}")
    assert answer.status_code == 200
    assert "failed" not in strict.server.text()
    assert "Traceback" not in strict.server.text()


def test_threat_28_a_request_before_a_malformed_one_is_answered(strict: System) -> None:
    """A valid request is answered although the bytes after it are no request."""
    with connect(strict.url) as connection:
        connection.sendall(SMUGGLED + b"\x00\x01\x02\r\n\r\n")
        assert statuses(read_all(connection)) == [200, 400]
