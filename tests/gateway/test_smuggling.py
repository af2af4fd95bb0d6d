"""Requests that two parsers may read differently: none takes a priced answer through the gateway without a payment.

The upstream here is not aiohttp and reads strictly (`rawupstream`): it sees whole requests that the gateway decided
about, one answer each, or nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from paychan.protocol.wire import x402
from paychan.protocol.wire.x402_json import read_required
from tests.api.test_wire import CORPUS
from tests.api.wire import connect, exchange, read_all, statuses
from tests.gateway.rawupstream import OK, RawUpstream
from tests.gateway.shop import PRICES, Customer, Shop, open_shop
from tests.lib.customer import wait_for

HIDDEN = b"GET /v1/hidden HTTP/1.1\r\nHost: shop.example\r\n\r\n"
LAST = b"GET /free/last HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n"
HOST = b"Host: shop.example\r\n"


@pytest.fixture(scope="module")
def raw() -> Iterator[RawUpstream]:
    upstream = RawUpstream()
    yield upstream
    upstream.stop()


@pytest.fixture(scope="module")
def shop(raw: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    prices = (
        PRICES.replace("{upstream}", raw.url) + '[[route]]\npath = "/cheap/**"\nmethods = ["POST"]\nprice_sat = 1\n'
    )
    prices += '[[route]]\npath = "/cheap/**"\nmethods = ["GET"]\nprice_sat = 25\n'
    with open_shop(tmp_path_factory.mktemp("smuggling"), prices) as opened:
        yield opened


def on_free_path(content: bytes) -> bytes:
    """Send a request of the corpus to a free path, with a priced request in place of the smuggled one."""
    first, _, rest = content.partition(b"\r\n")
    method, _, tail = first.partition(b" ")
    if tail.startswith(b"/"):
        target, _, version = tail.rpartition(b" ")
        first = b"%b /free%b %b" % (method, target if target != b"/" else b"/x", version)
    return first + b"\r\n" + rest.replace(CORPUS_HIDDEN, HIDDEN)


CORPUS_HIDDEN = CORPUS["no Host"].partition(b"\r\n\r\n")[2]
assert CORPUS_HIDDEN.count(b"HTTP/1.1") == 1


@pytest.fixture
def customer(shop: Shop) -> Customer:
    return Customer(shop)


def talk(shop: Shop, *pieces: bytes) -> list[int]:
    """Send bytes and a last free request that ends the connection; return the statuses of all answers."""
    return statuses(exchange(shop.url, *pieces, LAST).replace(b"HTTP/1.0", b"HTTP/1.1"))


ONE_READING = {"trailer": [200, 402, 200], "two spaces": [402, 402, 200], "a thousand fields": [200, 402, 200]}
"""Requests of the corpus that the gateway answers, because what it passes on has one reading; then come those behind."""


@pytest.mark.parametrize("kind", CORPUS)
def test_threat_28_no_ambiguous_request_hides_another_from_the_price(shop: Shop, raw: RawUpstream, kind: str) -> None:
    """It gets 400 and the end of its connection, and no upstream sees it or the one behind it."""
    seen = len(raw.targets)
    got = talk(shop, on_free_path(CORPUS[kind]))
    assert got == ONE_READING.get(kind, [400])
    assert raw.confused == []
    assert not [target for _, target in raw.targets[seen:] if "hidden" in target]
    if kind not in ONE_READING:
        assert raw.targets[seen:] == []


def test_the_log_does_not_grow_with_malformed_requests(shop: Shop) -> None:
    """Bytes that are no HTTP write no line: any stranger can send them."""
    assert shop.system.server is not None
    before = shop.system.server.text()
    for _ in range(20):
        assert talk(shop, b"\x00\x01\r\n\r\n") == [400]
    assert shop.system.server.text() == before


def get(target: bytes, *fields: bytes, method: bytes = b"GET") -> bytes:
    return b"".join(line + b"\r\n" for line in (method + b" " + target + b" HTTP/1.1", HOST[:-2], *fields, b""))


@pytest.mark.parametrize("first", ["free", "priced"])
def test_a_free_and_a_priced_request_in_one_segment_are_two_requests(
    shop: Shop, raw: RawUpstream, customer: Customer, first: str
) -> None:
    """Pipelined requests are answered in their order, each by its own price; a payment counts for its own request."""
    payment = b"PAYMENT-SIGNATURE: " + customer.headers("/v1/paid", 25)["PAYMENT-SIGNATURE"].encode()
    free, priced, paid = get(b"/free/a"), get(b"/v1/b"), get(b"/v1/paid", payment)
    pieces = [free, priced, paid] if first == "free" else [priced, paid, free]
    seen = len(raw.targets)
    assert talk(shop, b"".join(pieces)) == ([200, 402, 200, 200] if first == "free" else [402, 200, 200, 200])
    assert [target for _, target in raw.targets[seen:]].count("/v1/paid") == 1
    assert "/v1/b" not in [target for _, target in raw.targets[seen:]]


def test_the_beginning_of_a_request_stays_before_what_follows(shop: Shop, raw: RawUpstream) -> None:
    """A head in two segments is one head, although the second alone would be a plain priced request."""
    with connect(shop.url) as client:
        client.sendall(get(b"/free/whole") + b"GET /free/half HTTP/1.1\r\nX: ")
        assert b"ok" in read_until(client, b"ok")
        client.sendall(get(b"/v1/inside") + LAST)
        assert statuses(read_all(client)) == [200, 200]
    assert ("GET", "/free/half") in raw.targets


def read_until(client: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        piece = client.recv(65536)
        assert piece, received
        received += piece
    return received


@pytest.mark.parametrize(
    ("target", "fields", "status"),
    [
        (b"http://shop.example/v1/x", [], 400),
        (b"http://shop.example/free/x", [], 400),
        (b"//shop.example/v1/x", [], 400),
        (b"/free/../v1/x", [], 400),
        (b"/free/%2e%2e/v1/x", [], 400),
        (b"*", [], 400),
        (b"/v1/x", [b"X-Original-URL: /free/x"], 402),
        (b"/v1/x", [b"X-Rewrite-URL: /free/x", b"X-Forwarded-Host: free.example"], 402),
        (b"/v1/x", [b"X-HTTP-Method-Override: OPTIONS", b"Access-Control-Request-Method: GET"], 402),
    ],
)
def test_no_other_name_of_a_target_is_free(
    shop: Shop, raw: RawUpstream, target: bytes, fields: list[bytes], status: int
) -> None:
    """The price is that of the target alone."""
    seen = len(raw.targets)
    assert talk(shop, get(target, *fields))[0] == status
    assert [each for each in raw.targets[seen:] if each[1] != "/free/last"] == []


@pytest.mark.parametrize("host", [b"a,b", b"a@b", b"a/b", b"", b"shop.example\tx", b"shop.example:x"])
def test_a_host_that_none_can_have_is_refused(shop: Shop, raw: RawUpstream, host: bytes) -> None:
    """The Host goes into the URL that is paid for, so it is a name and at most a port."""
    seen = len(raw.targets)
    assert talk(shop, b"GET /free/x HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") == [400]
    assert raw.targets[seen:] == []


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE"])
@pytest.mark.parametrize("target", [b"/free/x", b"shop.example:443"])
def test_methods_about_the_way_are_refused(shop: Shop, raw: RawUpstream, method: bytes, target: bytes) -> None:
    """CONNECT would make a tunnel of the upstream's connection, and TRACE would show what the gateway adds."""
    seen = len(raw.targets)
    assert talk(shop, get(target, method=method))[0] in (400, 405)
    assert [each for each in raw.targets[seen:] if each[1] != "/free/last"] == []


UPGRADE = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: " + b"A" * 22 + b"==",
)


def test_an_upgrade_changes_no_method(shop: Shop, raw: RawUpstream, customer: Customer) -> None:
    """A POST that costs 1 sat and asks for a WebSocket reaches the upstream as POST, not as the GET that costs 25."""
    offered = shop.http.post(shop.url + "/cheap/x")
    found = x402.offers(read_required(offered.headers["PAYMENT-REQUIRED"]))[0]
    customer.paid_sat += 1
    payment = b"PAYMENT-SIGNATURE: " + x402.payment_header(found, customer.voucher()).encode()
    seen = len(raw.targets)
    assert talk(shop, get(b"/cheap/x", payment, *UPGRADE, method=b"POST")) == [200, 200]
    assert raw.targets[seen:][0] == ("POST", "/cheap/x")
    assert b"upgrade" not in raw.heads[seen].lower()


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.0"])
def test_a_declined_upgrade_swallows_no_request(shop: Shop, raw: RawUpstream, upgrade: bytes) -> None:
    """Bytes behind a request for another protocol are the next request with its price, or the connection has ended."""
    seen = len(raw.targets)
    first = get(
        b"/free/up",
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: " + upgrade,
        b"HTTP2-Settings: AAMA",
        *UPGRADE[2:],
    )
    got = talk(shop, first + HIDDEN)
    assert got == ([502, 402, 200] if upgrade == b"websocket" else [200])
    assert "/v1/hidden" not in [target for _, target in raw.targets[seen:]]


def test_the_upstream_sees_no_field_of_one_connection_and_no_word_of_a_stranger(
    shop: Shop, raw: RawUpstream, customer: Customer
) -> None:
    """Hop-by-hop fields, those that Connection names, and forged facts of the gateway end at the gateway, however spelt."""
    payment = b"PAYMENT-SIGNATURE: " + customer.headers("/v1/hop", 25)["PAYMENT-SIGNATURE"].encode()
    forged = [
        b"X-Paychan-Credit: 1000000",
        b"X_Paychan_Channel: x",
        b"x-paychan_charged: 7",
        b"X_Forwarded_For: 1.1.1.1",
    ]
    forged += [b"X-Forwarded-For: 1.1.1.1", b"Forwarded: for=1.1.1.1", b"Payment_Signature: x", b"Content_Length: 9"]
    hop = [
        b"Connection: keep-alive, X-Hop, X-Paychan-Channel, Host",
        b"X-Hop: secret",
        b"Keep-Alive: 5",
        b"TE: trailers",
    ]
    hop += [b"Proxy-Authorization: Basic eA==", b"Proxy-Connection: keep-alive", b"Trailer: X"]
    seen = len(raw.heads)
    assert talk(shop, get(b"/v1/hop", payment, *forged, *hop, b"X-Kept: yes")) == [200, 200]
    lines = [line.split(b": ", 1) for line in raw.heads[seen].split(b"\r\n")[1:-2]]
    fields = {name.decode().lower(): value.decode() for name, value in lines}
    assert len(fields) == len(lines)
    assert fields == {
        "host": "shop.example",
        "x-kept": "yes",
        "x-paychan-channel": str(customer.payer.outpoint),
        "x-paychan-charged": "25",
        "x-paychan-credit": "0",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "http",
        "x-forwarded-host": "shop.example",
    }


def test_the_payer_sees_no_field_of_one_connection_and_no_forged_receipt(shop: Shop, raw: RawUpstream) -> None:
    """The same the other way: an upstream's hop-by-hop fields and payment fields end at the gateway."""
    fields = (
        b"Connection: X-Hop\r\nX-Hop: secret\r\nKeep-Alive: timeout=9\r\nPayment-Receipt: x\r\nPAYMENT-REQUIRED: x\r\n"
    )
    answering(
        raw, b"HTTP/1.1 200 OK\r\nX-Paychan-Price: 1\r\n" + fields + b"X-Kept: yes\r\nContent-Length: 2\r\n\r\nok"
    )
    answer = shop.get("/free/back")
    names = {name.lower() for name in answer.headers}
    assert names == {"x-kept", "content-length", "content-type", "date", "server"}


def answering(raw: RawUpstream, *answers: bytes) -> None:
    """Give these answers to the next requests, and then the usual one."""
    left = list(answers)

    def answer(connection: socket.socket) -> None:
        connection.sendall(left.pop(0) if left else OK)

    raw.answer = answer


def test_an_answer_with_two_lengths_is_cut_by_the_coding(shop: Shop, raw: RawUpstream) -> None:
    """The payer's connection does not go out of step: the length that the coding overrides is not passed on."""
    answering(raw, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    with connect(shop.url) as client:
        client.sendall(get(b"/free/two") + LAST)
        received = read_all(client)
    assert statuses(received) in ([200, 200], [502, 200])
    assert b"Content-Length: 100" not in received


def test_bytes_behind_an_answer_are_nobodys_answer(shop: Shop, raw: RawUpstream, customer: Customer) -> None:
    """An upstream that sends two answers to one request gives the second to no other payer."""
    planted = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nplanted"
    for path in ("/free/one", "/v1/one"):
        answering(raw, OK + planted)
        first = shop.get(path) if path.startswith("/free") else customer.get(path)
        assert first.text == "ok"
        assert [shop.get("/free/next").text for _ in range(3)] == ["ok"] * 3


def test_a_payer_that_leaves_in_its_body_leaves_no_beginning_for_another(shop: Shop, raw: RawUpstream) -> None:
    """The upstream's connection with half a body is closed, and not given to the next payer."""
    seen = len(raw.targets)
    with connect(shop.url) as client:
        client.sendall(get(b"/free/half-body", b"Content-Length: 100000", method=b"POST") + bytes(70_000))
        wait_for(lambda: ("POST", "/free/half-body") in raw.targets[seen:], "the upstream has the head")
    assert [shop.get("/free/next").text for _ in range(3)] == ["ok"] * 3
    assert raw.confused == []
