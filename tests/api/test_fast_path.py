"""The fast path and Tornado's handlers give a client the same answers: the same bytes for the same bytes.

Each request, plain, unusual or hostile, is sent to a server with the fast path and to one without. Both know the same
channels. The test compares all bytes until the connection ends, except the date and the port.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from paychan.protocol.payment import Payment, encode_v1
from paychan.protocol.wire.rbpcp import Dialect
from tests.api.test_wire import CLEAR, CORPUS
from tests.api.wire import connect, exchange, read_all, statuses
from tests.lib.looped import looped
from tests.lib.rbpcp import V1, V2, Payer
from tests.lib.system import System

HOST = b"Host: localhost\r\n"
LAST = b"GET /last HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"


class Pair(NamedTuple):
    """A server with the fast path, one without, and clients whose channels are open on both."""

    fast: System
    handlers: System
    v1: V1
    v2: dict[Dialect, V2]

    def both(self, content: bytes) -> tuple[bytes, bytes]:
        """Send the same bytes to both servers; return both answers."""
        return _answers(self.fast.url, content), _answers(self.handlers.url, content)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    limits = "max_bad_signatures = 1000\n"
    with (
        System(tmp_path_factory.mktemp("fast"), sections={"http": limits}) as fast,
        System(tmp_path_factory.mktemp("handlers"), sections={"http": limits + "fast_lane = false"}) as handlers,
        httpx.Client(trust_env=False, verify=False) as http,
    ):
        payers = [Payer() for _ in range(3)]
        for system in (handlers, fast):
            v1 = V1(system.url, payers[0], http)
            v2 = {each: V2(system.url, payer, http, each) for each, payer in zip(Dialect, payers[1:], strict=True)}
            for client in (v1, *v2.values()):
                assert client.open(client.payer.payment(100_000)).status_code == 201
        yield Pair(fast, handlers, v1, v2)


def _answers(url: str, content: bytes) -> bytes:
    received = re.sub(rb"\r\nDate: [^\r]*", b"\r\nDate: then", exchange(url, content))
    return received.replace(url.rpartition(":")[2].encode(), b"PORT")


def _put(path: str, *fields: bytes, body: bytes = b"") -> bytes:
    """Build a plain request with extra fields, and Content-Length if it has a body."""
    length = [b"Content-Length: %d" % len(body)] if body else []
    return b"\r\n".join([f"PUT {path} HTTP/1.1".encode(), HOST[:-2], *fields, *length, b"", b""]) + body


def _v1(pair: Pair, payment: Payment | str, tail: str = "") -> str:
    text = payment if isinstance(payment, str) else encode_v1(payment)
    return f"{pair.v1.resource.removeprefix(pair.v1.url)}{tail}?payment={text}"


def _v2(pair: Pair, dialect: Dialect = Dialect.S) -> str:
    return pair.v2[dialect].resource().removeprefix(pair.v2[dialect].url)


# --- accepted and refused payments ----------------------------------------------------------------------------------

PAYMENTS = {
    "v1, 1 sat": lambda p: _put(_v1(p, p.v1.payer.payment(100_001))),
    "v1, again": lambda p: _put(_v1(p, p.v1.payer.payment(100_001))),
    "v1, by /pay": lambda p: _put(_v1(p, p.v1.payer.payment(100_002), "/pay")),
    "v1, with a body": lambda p: _put(_v1(p, p.v1.payer.payment(100_003)), body=b"hello"),
    "v1, padded and quoted": lambda p: _put(_v1(p, encode_v1(p.v1.payer.payment(100_004)) + "%3D%3D")),
    "v1, backwards": lambda p: _put(_v1(p, p.v1.payer.payment(100_000))),
    "v1, dust": lambda p: _put(_v1(p, p.v1.payer.payment_of_change(699))),
    "v1, bad signature": lambda p: _put(_v1(p, Payer().payment(100_010))),
    "v1, no base64": lambda p: _put(_v1(p, "!!!!")),
    "v1, empty": lambda p: _put(_v1(p, "")),
    "v1, no payment": lambda p: _put(_v1(p, "").partition("?")[0]),
    "v1, two payments": lambda p: _put(_v1(p, "AAAA&payment=AAAA")),
    "v1, not UTF-8": lambda p: _put(_v1(p, "%ff")),
    "v1, another field": lambda p: _put(_v1(p, p.v1.payer.payment(100_005)) + "&test=1"),
    "v1, fragment": lambda p: _put(_v1(p, "AAAA#x")),
    "v1, unknown": lambda _: _put("/v1/channels/" + "0" * 64 + "/0?payment=AAAA"),
    "v1, unknown, right payment": lambda p: _put(
        "/v1/channels/" + "0" * 64 + f"/0?payment={encode_v1(p.v1.payer.payment(100_000))}"
    ),
    "v1, output that can't be": lambda _: _put("/v1/channels/" + "0" * 64 + "/4294967296?payment=AAAA"),
    "v1, output 00": lambda _: _put("/v1/channels/" + "0" * 64 + "/00?payment=AAAA"),
    "v1, upper-case txid": lambda _: _put("/v1/channels/" + "A" * 64 + "/0?payment=AAAA"),
    "v1, channel of v2": lambda p: _put(_v2(p).replace("/v2", "/v1").partition("?")[0] + "?payment=AAAA"),
    "v2 S, 1 sat": lambda p: _put(_v2(p), body=p.v2[Dialect.S].body(p.v2[Dialect.S].payer.payment(100_001))),
    "v2 A, 1 sat": lambda p: _put(_v2(p, Dialect.A), body=p.v2[Dialect.A].body(p.v2[Dialect.A].payer.payment(100_001))),
    "v2, no body": lambda p: _put(_v2(p)),
    "v2, no JSON": lambda p: _put(_v2(p), body=b"{"),
    "v2, repeated key": lambda p: _put(_v2(p), body=b'{"change_value":1,"change_value":2,"signature_data":""}'),
    "v2, wrong type": lambda p: _put(_v2(p), body=b'{"change_value":true,"signature_data":""}'),
    "v2, bad signature": lambda p: _put(_v2(p), body=p.v2[Dialect.S].body(Payer().payment(100_010))),
    "v2, other outpoint": lambda p: _put(
        _v2(p),
        body=p.v2[Dialect.S].body(p.v2[Dialect.S].payer.payment(100_002), funding_txid="0" * 64, funding_vout=0),
    ),
    "v2, wrong secret": lambda p: _put(
        _v2(p).partition("?")[0] + "?secret=" + "0" * 64,
        body=p.v2[Dialect.S].body(p.v2[Dialect.S].payer.payment(100_002)),
    ),
    "v2, no secret": lambda p: _put(
        _v2(p).partition("?")[0], body=p.v2[Dialect.S].body(p.v2[Dialect.S].payer.payment(100_002))
    ),
    "v2, unknown": lambda p: _put(
        "/v2/channels/" + "0" * 64 + "/0", body=p.v2[Dialect.S].body(p.v2[Dialect.S].payer.payment(100_002))
    ),
    "too large": lambda p: _put(_v2(p), body=b"x" * 4097),
    "far too large": lambda p: _put(_v2(p), b"Content-Length: 1000000000000"),
}


@looped("kind", PAYMENTS)
def test_a_payment_has_one_answer(pair: Pair, kind: str) -> None:
    """For every payment, head and body of the answer are the same on both servers."""
    fast, handlers = pair.both(PAYMENTS[kind](pair) + LAST)

    assert fast == handlers
    assert statuses(fast)


# --- framing --------------------------------------------------------------------------------------------------------

FIELDS = {
    "keep-alive": b"Connection: keep-alive",
    "Keep-Alive": b"connection: Keep-Alive",
    "close": b"Connection: close",
    "CLOSE": b"CONNECTION: CLOSE",
    "close twice": b"Connection: close\r\nConnection: close",
    "close and more": b"Connection: close, x",
    "upgrade": b"Connection: Upgrade\r\nUpgrade: h2c",
    "upgrade to nothing": b"Connection: upgrade",
    "empty upgrade": b"Upgrade:\r\nConnection: upgrade",
    "two upgrades": b"Upgrade:\r\nUpgrade: h2c\r\nConnection: upgrade",
    "upgrade without option": b"Upgrade: h2c",
    "keep-alive, upgrade": b"Connection: keep-alive, Upgrade",
    "close, upgrade": b"Connection: close , upgrade",
    "keep-alive, close": b"Connection: keep-alive,close",
    "empty option": b"Connection:",
    "close in the second line": b"Connection: keep-alive\r\nConnection: close",
    "WebSocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA",
    "expectation": b"Expect: 100-continue",
    "other expectation": b"Expect: more",
    "content type": b"Content-Type: multipart/form-data; boundary=x",
    "gzip": b"Content-Encoding: gzip",
    "empty field": b"X:",
    "tabs": b"X:\t a\tb \t",
    "obs-text": b"X: \xe9",
    "DEL": b"X: \x7f",
    "proxy": b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https",
    "length 0": b"Content-Length: 0",
    "length 00": b"Content-Length: 00",
    "length of too many digits": b"Content-Length: 0000000000000000000",
    "equal lengths": b"Content-Length: 0\r\nContent-Length: 0",
    "second Host": b"Host: localhost",
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n0",
    "chunked with extension": b"Transfer-Encoding: chunked\r\n\r\n0;x=y",
    "fold": b"X: a\r\n b",
    "8 kB": b"X: " + b"x" * 7_800,
    "more than 8 kB": b"X: " + b"x" * 8_300,
    "100 fields": b"\r\n".join(b"X-%d: y" % number for number in range(100)),
}


@looped("kind", FIELDS)
def test_another_header_field_has_the_same_effect_on_both(pair: Pair, kind: str) -> None:
    """A payment with a further header field gets the same bytes, and keeps or ends the connection, on both servers."""
    content = _put(_v1(pair, pair.v1.payer.payment(100_001)), FIELDS[kind])
    fast, handlers = pair.both(content + LAST)

    assert fast == handlers


LINES = {
    "HTTP/1.0": (b" HTTP/1.1", b" HTTP/1.0"),
    "HTTP/1.0 that closes": (b" HTTP/1.1\r\n", b" HTTP/1.0\r\nConnection: close\r\n"),
    "HTTP/1.0 that upgrades": (b" HTTP/1.1\r\n", b" HTTP/1.0\r\nConnection: upgrade\r\n"),
    "HTTP/1.0 that keeps alive and upgrades": (b" HTTP/1.1\r\n", b" HTTP/1.0\r\nConnection: keep-alive, upgrade\r\n"),
    "HTTP/1.0 without Host": (b" HTTP/1.1\r\n" + HOST, b" HTTP/1.0\r\n"),
    "HTTP/1.2": (b" HTTP/1.1", b" HTTP/1.2"),
    "http/1.1": (b" HTTP/1.1", b" http/1.1"),
    "no version": (b" HTTP/1.1", b""),
    "two spaces": (b"PUT ", b"PUT  "),
    "tab": (b"PUT ", b"PUT\t"),
    "trailing space": (b" HTTP/1.1", b" HTTP/1.1 "),
    "lower-case method": (b"PUT", b"put"),
    "PATCH": (b"PUT", b"PATCH"),
    "absolute target": (b"PUT ", b"PUT http://localhost"),
    "two slashes": (b"PUT /", b"PUT //"),
    "dot segment": (b"PUT /v1", b"PUT /v1/."),
    "quoted path": (b"PUT /v1", b"PUT /%76%31"),
    "NUL in target": (b"?", b"?\x00"),
    "obs-text in target": (b"?", b"?\xe9&"),
    "bare LF": (b"\r\n", b"\n"),
    "empty line before": (b"PUT", b"\r\nPUT"),
    "bare CR": (b"localhost\r\n", b"localhost\r\nX: a\rb\r\n"),
    "no Host": (HOST, b""),
    "empty Host": (b"localhost", b""),
    "Host list": (b"localhost", b"a,b"),
    "Host with path": (b"localhost", b"a/b"),
    "Host with underscore": (b"localhost", b"a_b"),
    "Host with letters for a port": (b"localhost", b"localhost:x"),
    "HTTP/1.0 kept alive": (b" HTTP/1.1\r\n", b" HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 0\r\n"),
    "a thousand fields": (b"?", b"?" + b"&" * 1001),
}


@looped("kind", LINES)
def test_an_unusual_first_line_or_host_has_one_answer(pair: Pair, kind: str) -> None:
    """A payment with an unusual first line or Host gets the same bytes from both servers, as one parser judges it."""
    content = _put(_v1(pair, pair.v1.payer.payment(100_001))).replace(*LINES[kind])
    fast, handlers = pair.both(content + LAST)

    assert fast == handlers


@pytest.mark.parametrize("as_payment", [False, True])
@looped("kind", [*CORPUS, *CLEAR])
def test_hostile_framing_has_one_answer(pair: Pair, kind: str, as_payment: bool) -> None:
    """A request on which parsers disagree gets the same bytes from both servers, as it is and as a payment."""
    content = CORPUS[kind] if kind in CORPUS else CLEAR[kind][0] + LAST
    if as_payment:
        payment = b"PUT\\1" + _v1(pair, pair.v1.payer.payment(100_001)).encode()
        content = re.sub(rb"\A(?:GET|POST)(\s+)/[^ ?\0]*", payment, content)
    fast, handlers = pair.both(content)

    assert fast == handlers


def test_fast_path_and_fallback_alternate_on_one_connection(pair: Pair) -> None:
    """Payments, other requests and refusals on one connection are each answered, in order."""
    page = b"GET /v1/fundingInfo HTTP/1.1\r\n" + HOST + b"\r\n"
    chunked = _put(_v1(pair, "AAAA"), b"Transfer-Encoding: chunked") + b"2\r\nhi\r\n0\r\n\r\n"
    pays = [_put(_v1(pair, pair.v1.payer.payment(200_000 + paid))) for paid in range(8)]
    unknown = _put("/v1/channels/" + "0" * 64 + f"/0?payment={encode_v1(pair.v1.payer.payment(100_000))}")
    content = pays[0] + page + page + pays[1] + pays[2] + chunked + pays[3] + unknown + pays[4] + page + pays[5]
    fast, handlers = pair.both(content + LAST)

    assert fast == handlers
    assert statuses(fast) == [200, 400, 400, 200, 200, 400, 200, 404, 200, 400, 200, 404]


@pytest.mark.parametrize("version", [1, 2])
def test_a_request_may_arrive_byte_by_byte(pair: Pair, version: int) -> None:
    """Requests that arrive in small pieces are read like whole ones."""
    v2 = pair.v2[Dialect.S]
    if version == 1:
        content = _put(_v1(pair, pair.v1.payer.payment(300_000))) * 2
    else:
        content = _put(_v2(pair), body=v2.body(v2.payer.payment(300_000))) * 2
    with connect(pair.fast.url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in content + LAST:
            connection.sendall(bytes([byte]))
        assert statuses(read_all(connection)) == [200, 200, 404]


def test_a_half_closed_connection_gets_its_answers(pair: Pair) -> None:
    """A client that has closed its sending side gets the answers to its requests."""
    payment = _put(_v1(pair, pair.v1.payer.payment(300_001)))
    with connect(pair.fast.url) as connection:
        connection.sendall(payment * 40)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(read_all(connection)) == [200] * 40


def test_payments_above_the_limit_in_progress_wait(pair: Pair) -> None:
    """A thousand payments in one piece are each answered, in order, on both servers."""
    pair.both(_put(_v1(pair, pair.v1.payer.payment(399_999))) + LAST)  # now both servers have the same state
    payments = [pair.v1.payer.payment(400_000 + paid) for paid in range(1_000)]
    fast, handlers = pair.both(b"".join(_put(_v1(pair, payment)) for payment in payments) + LAST)

    left = [int(number) for number in re.findall(rb'"channel_value_left":(\d+)', fast)]
    assert left == [payment.change_sat for payment in payments]
    assert fast == handlers


def test_a_fallback_waits_for_earlier_payments_and_delays_later_ones(pair: Pair) -> None:
    """Requests after a fallback are not read before it is answered, however many are sent."""
    pay = _put(_v1(pair, pair.v1.payer.payment(500_000)))
    page = b"OPTIONS /v1/fundingInfo HTTP/1.1\r\n" + HOST + b"\r\n"
    fast, handlers = pair.both((pay + page) * 300 + LAST)

    assert statuses(fast) == [200, 200] * 300 + [404]
    assert re.sub(rb'"value_received":\d+', b"", fast) == re.sub(rb'"value_received":\d+', b"", handlers)


# --- shortcuts of the fast path -------------------------------------------------------------------------------------


@pytest.fixture
def fresh(pair: Pair) -> Iterator[Pair]:
    """The same two servers, with new clients and channels."""
    with httpx.Client(trust_env=False, verify=False) as http:
        payers = [Payer() for _ in range(3)]
        for system in (pair.handlers, pair.fast):
            v1 = V1(system.url, payers[0], http)
            v2 = {each: V2(system.url, payer, http, each) for each, payer in zip(Dialect, payers[1:], strict=True)}
            for client in (v1, *v2.values()):
                assert client.open(client.payer.payment(100_000)).status_code == 201
        yield Pair(pair.fast, pair.handlers, v1, v2)


def test_cached_header_lines_have_their_usual_effect(fresh: Pair) -> None:
    """Header lines that a connection repeats are not parsed again.

    With another length, body or target they still apply.
    """
    client, field = fresh.v2[Dialect.S], b"X-Same: 1"
    odd = [
        lambda body: _put(_v2(fresh), field, body=body[:-1] + b" "),  # the same length, but not JSON
        lambda body: _put(_v2(fresh) + "&x=%", field, body=body),
        lambda body: _put(_v2(fresh), field, body=body).replace(b"HTTP/1.1", b"HTTP/1.2", 1),
        *(
            lambda body, odd=odd: _put(_v2(fresh), field, body=body).replace(b"?secret=", odd + b"?secret=", 1)
            for odd in (b"\n", b" ", b"\t", b"\x00", b"\xff", b"#", b" HTTP/1.1\r\nX: y")
        ),
    ]
    for number, make in enumerate(odd):
        bodies = [client.body(client.payer.payment(101_000 + 10 * number + paid)) for paid in range(4)]
        requests = [_put(_v2(fresh), field, body=body) for body in bodies[:3]]
        fast, handlers = fresh.both(b"".join(requests) + make(bodies[3]) + LAST)
        assert fast == handlers
        assert statuses(fast)[:3] == [200, 200, 200]


@pytest.mark.parametrize("coalesce", [True, False])
def test_of_pipelined_payments_the_newest_is_verified_first(tmp_path: Path, coalesce: bool) -> None:
    """As in a stream, the newest payment covers the earlier ones; without `stream.coalesce` each is verified."""
    stream = {"stream": f"coalesce = {str(coalesce).lower()}"}
    with System(tmp_path, sections=stream) as system, httpx.Client(trust_env=False, verify=False) as http:
        client = V1(system.url, Payer(), http)
        assert client.open(client.payer.payment(100_000)).status_code == 201
        path = client.resource.removeprefix(client.url)
        bad = Payment(client.payer.payment(100_001).change_sat, client.payer.payment(7).signature, 0x83)
        sent = [bad, client.payer.payment(100_002), client.payer.payment(100_003)]
        content = b"".join(_put(f"{path}?payment={encode_v1(payment)}") for payment in sent)
        received = exchange(system.url, content + LAST)
        assert statuses(received) == [200 if coalesce else 400, 200, 200, 404]
        values = [int(value) for value in re.findall(rb'"value_received":(\d+)', received)]
        assert values == ([1, 1, 1] if coalesce else [2, 1])
        left = [int(value) for value in re.findall(rb'"channel_value_left":(\d+)', received)]
        assert left[-1] == sent[-1].change_sat


def test_pipelined_payments_of_many_channels_get_their_own_answers(fresh: Pair) -> None:
    """Good, bad and repeated payments of several channels in one write: the n-th answer is for the n-th payment."""
    v1, v2 = fresh.v1, fresh.v2[Dialect.A]
    content = b"".join(
        each
        for paid in range(300_101, 300_104)
        for each in (
            _put(_v1(fresh, v1.payer.payment(paid))),
            _put(_v2(fresh, Dialect.A), body=v2.body(v2.payer.payment(paid))),
            _put(_v1(fresh, v1.payer.payment(paid))),
            _put(_v1(fresh, v1.payer.payment(5))),
        )
    )
    fast, handlers = fresh.both(content + LAST)
    assert fast == handlers
    assert statuses(fast) == [200, 200, 200, 400] * 3 + [404]
