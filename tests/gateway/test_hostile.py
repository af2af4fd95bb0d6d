"""Bad payments, bad upstreams and clients that hold on: each test says what the payer and the seller are left with."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from paychan.protocol.types import UnixTime
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.offers import Voucher
from paychan.protocol.wire.x402_json import read_required
from tests.api.wire import connect, exchange, read_all, statuses
from tests.gateway.rawupstream import OK, RawUpstream
from tests.gateway.shop import OPENING_SAT, PRICES, Bill, Customer, Shop, open_shop
from tests.lib.customer import wait_for

GET = b"GET %b HTTP/1.1\r\nHost: shop.example\r\n\r\n"


@pytest.fixture(scope="module")
def raw() -> Iterator[RawUpstream]:
    upstream = RawUpstream()
    yield upstream
    upstream.stop()


@pytest.fixture(scope="module")
def shop(raw: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    prices = PRICES.replace("{upstream}", raw.url).replace("_seconds = 2", "_seconds = 0.5")
    http = {"http": "max_bad_signatures = 6\nhead_seconds = 1\nidle_seconds = 3"}
    with open_shop(tmp_path_factory.mktemp("hostile"), prices, http) as opened:
        yield opened


@pytest.fixture
def customer(shop: Shop, raw: RawUpstream) -> Customer:
    raw.answer = lambda connection: connection.sendall(OK)
    return Customer(shop)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    shown = answer.json()
    return answer.status_code, shown["code"] if "code" in shown else shown["error"]["code"]


# --- payments ---------------------------------------------------------------------------------------------------------


def signature_of_another(customer: Customer) -> dict[str, str]:
    found = x402.offers(read_required(customer.shop.get("/v1/x").headers["PAYMENT-REQUIRED"]))[0]
    other = Customer(customer.shop).payer.payment(OPENING_SAT + 25)
    voucher = Voucher.of(customer.payer.outpoint, customer.payer.funding_sat, other)
    return {"PAYMENT-SIGNATURE": x402.payment_header(found, voucher)}


def wrong_hmac(customer: Customer) -> dict[str, str]:
    shown = mpp.offers(customer.shop.get("/v1/x").headers.get_list("WWW-Authenticate"))[0]
    forged = mpp.challenge(shown.offer, bytes(32), UnixTime(int(time.time()) + 300))
    return {"Authorization": mpp.credential_header(forged, customer.voucher(OPENING_SAT + 25))}


def expired(customer: Customer) -> dict[str, str]:
    secret = bytes.fromhex((customer.shop.system.state / "gateway.secrets").read_text().split()[0])
    shown = mpp.offers(customer.shop.get("/v1/x").headers.get_list("WWW-Authenticate"))[0]
    old = mpp.challenge(shown.offer, secret, UnixTime(int(time.time()) - 1))
    return {"Authorization": mpp.credential_header(old, customer.voucher(OPENING_SAT + 25))}


def both(customer: Customer) -> dict[str, str]:
    first = customer.headers("/v1/x", 25)
    return {**first, **customer.headers("/v1/x", way="mpp")}


def both_names(customer: Customer) -> dict[str, str]:
    first = customer.headers("/v1/x", 25, way="mpp")
    return {**first, "Payment-Authorization": first["Authorization"]}


def encoded(text: str) -> Callable[[Customer], dict[str, str]]:
    return lambda _: {"PAYMENT-SIGNATURE": base64.b64encode(text.encode()).decode()}


BAD: dict[str, tuple[Callable[[Customer], dict[str, str]], tuple[int, str]]] = {
    "both ways": (both, (400, "two_payments")),
    "both names": (both_names, (400, "two_payments")),
    "no base64": (lambda _: {"PAYMENT-SIGNATURE": "!!!"}, (402, "malformed_payment")),
    "empty": (lambda _: {"PAYMENT-SIGNATURE": ""}, (402, "malformed_payment")),
    "no JSON": (encoded("hello"), (402, "malformed_payment")),
    "no object": (encoded("[]"), (402, "malformed_payment")),
    "empty object": (encoded("{}"), (402, "malformed_payment")),
    "deep JSON": (encoded('{"payload":' + "[" * 2000), (402, "malformed_payment")),
    "no credential": (lambda _: {"Authorization": "Payment !!!"}, (402, "malformed_payment")),
    "another scheme": (lambda _: {"Payment-Authorization": "Bearer x"}, (400, "payment_unsupported")),
    "another price": (lambda customer: customer.headers("/told/x", 40), (402, "offer_mismatch")),
    "another price, MPP": (lambda customer: customer.headers("/told/x", 40, way="mpp"), (402, "offer_mismatch")),
    "wrong HMAC": (wrong_hmac, (402, "invalid_challenge")),
    "expired challenge": (expired, (402, "challenge_expired")),
    "another channel's signature": (signature_of_another, (402, "bad_signature")),
    "less than accepted": (lambda customer: customer.headers("/v1/x", -1), (402, "value_backwards")),
    "no credit": (lambda customer: customer.headers("/v1/x", 24), (402, "credit_too_low")),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_payment_changes_nothing(shop: Shop, raw: RawUpstream, customer: Customer, kind: str) -> None:
    """The payer has what it had, also the value that the payment would have brought; the upstream saw no request."""
    make, expected = BAD[kind]
    calls = len(raw.targets)
    with httpx.Client() as stranger:
        answer = stranger.get(shop.url + "/v1/x", headers=make(customer))
    assert code_of(answer) == expected
    assert answer.headers["Cache-Control"] == "no-store"
    if expected[0] == 402:
        assert "PAYMENT-REQUIRED" in answer.headers
    assert len(raw.targets) == calls
    customer.paid_sat = OPENING_SAT
    assert customer.record() == (OPENING_SAT, OPENING_SAT)


def test_the_newest_payment_is_shown_to_no_caller_without_a_signature(shop: Shop, customer: Customer) -> None:
    """A bad signature gets no state of the channel: the newest payment is a secret of the payer's."""
    customer.get("/v1/x", 100)
    with httpx.Client() as stranger:
        refused = stranger.get(shop.url + "/v1/x", headers=signature_of_another(customer))
    found = x402.offers(read_required(refused.headers["PAYMENT-REQUIRED"]))[0]
    assert (refused.status_code, found.state) == (402, None)


def test_a_payment_for_one_path_pays_once(shop: Shop, raw: RawUpstream, customer: Customer) -> None:
    """Two paths of one price have equal offers: the first gets the answer, the second a refusal, whichever was meant."""
    headers = customer.headers("/v1/meant", 25)
    assert shop.get("/v1/other", headers=headers).status_code == 200
    assert code_of(shop.get("/v1/meant", headers=headers)) == (402, "credit_too_low")
    assert [target for _, target in raw.targets if target == "/v1/meant"] == []
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


@pytest.mark.parametrize("size", [9_000, 70_000, 1_000_000])
def test_an_oversized_payment_ends_its_connection(shop: Shop, raw: RawUpstream, size: int) -> None:
    """A head over the limit is not read to its end."""
    calls = len(raw.targets)
    head = b"GET /v1/x HTTP/1.1\r\nHost: shop.example\r\nPAYMENT-SIGNATURE: " + b"A" * size + b"\r\n\r\n"
    with connect(shop.url) as client:
        with contextlib.suppress(OSError):
            client.sendall(head)
        received = read_all(client)
    assert received == b"" or b" 400 " in received[:20]
    assert len(raw.targets) == calls


def test_bad_payments_delay_and_end_their_connection_alone(shop: Shop, customer: Customer) -> None:
    """As on the REST interface: each delays its connection longer, the sixth ends it; other connections do not wait."""
    bad = signature_of_another(customer)
    with httpx.Client() as stranger:
        begun = time.monotonic()
        got = [stranger.get(shop.url + "/v1/x", headers=bad).status_code for _ in range(6)]
        assert got == [402] * 6
        assert time.monotonic() - begun > 0.01 + 0.02 + 0.04 + 0.08 + 0.16 + 0.32
        ended = stranger.get(shop.url + "/v1/x", headers=bad)
        assert code_of(ended) == (429, "too_many_bad_signatures")
        assert ended.headers["Connection"] == "close"
    begun = time.monotonic()
    assert customer.get("/v1/x").status_code == 200
    assert time.monotonic() - begun < 0.5


# --- upstreams --------------------------------------------------------------------------------------------------------


def says(content: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_RDWR)

    return answer


def trickles(first: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    """Send a piece every tenth of a second, without an end."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(0.1)

    return answer


HEAD = b"HTTP/1.1 200 OK\r\n"
NO_ANSWER = {
    "nothing": (says(b""), 502),
    "garbage": (says(b"\x00\xff\r\n\r\n" * 50), 502),
    "half a head": (says(HEAD + b"X: y\r\n"), 502),
    "a head without end": (trickles(HEAD, b"X: y\r\n"), 504),
    "a line without end": (trickles(HEAD + b"X: ", b"y"), 504),
    "a large head": (says(HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n"), 502),
    "many fields": (says(HEAD + b"X: y\r\n" * 10_000 + b"\r\n"), 502),
    "1xx without end": (trickles(b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"), 504),
    "another protocol": (says(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"), 502),
    "two lengths": (says(HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"), 502),
    "a field of control characters": (says(HEAD + b"X: a\x00b\r\nContent-Length: 2\r\n\r\nok"), 502),
    "chunks of garbage": (says(HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nxyz\r\n"), 502),
    "silence": (lambda _: time.sleep(1.5), 504),
}


@pytest.mark.parametrize("kind", NO_ANSWER)
def test_an_upstream_without_an_answer_leaves_credit(
    shop: Shop, raw: RawUpstream, customer: Customer, kind: str
) -> None:
    """The payer hears of it in seconds, has the price as credit, and pays the next request from it."""
    raw.answer, status = NO_ANSWER[kind]
    begun = time.monotonic()
    answer = customer.get("/v1/x")
    assert (answer.status_code, Bill(answer).charged_sat, Bill(answer).state.credit_sat) == (status, 0, 25)
    assert time.monotonic() - begun < 5
    raw.answer = lambda connection: connection.sendall(OK)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT)
    assert customer.get("/v1/y", 0).text == "ok"
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


BROKEN = {
    "a body that is too short": says(HEAD + b"Content-Length: 100\r\n\r\nhalf"),
    "a chunk without end": says(HEAD + b"Transfer-Encoding: chunked\r\n\r\n64\r\nhalf"),
    "a body that stops": trickles(HEAD + b"Content-Length: 100\r\n\r\nhalf", b""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_answer_that_breaks_off_is_charged_and_seen_as_broken(
    shop: Shop, raw: RawUpstream, customer: Customer, kind: str
) -> None:
    """The charge stays with what began to leave; the payer sees the break, and its repetition is not charged again."""
    raw.answer = BROKEN[kind]
    headers = customer.headers("/v1/x", 25)
    with pytest.raises(httpx.RemoteProtocolError):
        shop.get("/v1/x", headers=headers)
    raw.answer = lambda connection: connection.sendall(OK)
    again = shop.get("/v1/x", headers=headers)
    assert (again.text, Bill(again).charged_sat) == ("ok", 25)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


def test_interim_answers_are_left_out(raw: RawUpstream, customer: Customer) -> None:
    """1xx before the answer are the upstream's affair with the gateway."""
    raw.answer = lambda connection: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\n\r\n" + OK)
    answer = customer.get("/v1/x")
    assert (answer.status_code, answer.text, Bill(answer).charged_sat) == (200, "ok", 25)


def test_a_payer_that_leaves_while_the_upstream_is_silent_has_credit(
    shop: Shop, raw: RawUpstream, customer: Customer
) -> None:
    """Nothing was delivered; no traceback is written either."""
    raw.answer = lambda _: time.sleep(1.5)
    calls = len(raw.targets)
    payment = customer.headers("/v1/x", 25)["PAYMENT-SIGNATURE"].encode()
    with connect(shop.url) as client:
        client.sendall(b"GET /v1/x HTTP/1.1\r\nHost: shop.example\r\nPAYMENT-SIGNATURE: " + payment + b"\r\n\r\n")
        wait_for(lambda: len(raw.targets) > calls, "the upstream has the request")
    wait_for(lambda: customer.record() == (OPENING_SAT + 25, OPENING_SAT), "the price is credit")
    assert shop.system.server is not None
    assert "Traceback" not in shop.system.server.text()


ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %b\r\n\r\n"
)


def accepts_late(connection: socket.socket, head: bytes) -> None:
    """Open a WebSocket after half a second."""
    key = re.search(rb"(?i)sec-websocket-key: ?(\S+)", head)
    assert key is not None
    time.sleep(0.5)
    digest = hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    connection.sendall(ACCEPTED % base64.b64encode(digest))


@pytest.mark.parametrize("kind", ["leaves", "has no key"])
def test_a_websocket_that_never_opens_is_credit(shop: Shop, raw: RawUpstream, customer: Customer, kind: str) -> None:
    """The payer leaves while the upstream is asked, or asks for no valid WebSocket: nothing was delivered."""
    raw.answer = lambda connection: accepts_late(connection, raw.heads[-1])
    calls = len(raw.targets)
    payment = customer.headers("/v1/ws", 25)["PAYMENT-SIGNATURE"].encode()
    key = b"" if kind == "has no key" else b"Sec-WebSocket-Key: " + b"A" * 22 + b"==\r\n"
    fields = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" + key
    with connect(shop.url) as client:
        client.sendall(b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nPAYMENT-SIGNATURE: " + payment + b"\r\n" + fields + b"\r\n")
        if kind == "has no key":
            assert b" 400 " in client.recv(65536)
            assert len(raw.targets) == calls
        else:
            wait_for(lambda: len(raw.targets) > calls, "the upstream is asked")
    raw.answer = lambda connection: connection.sendall(OK)
    wait_for(lambda: customer.record() == (OPENING_SAT + 25, OPENING_SAT), "the price is credit", 10)


# --- clients that hold on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "piece", [b"", b"X", b"GET /v1/x HTTP/1.1\r\nX: ", GET % b"/v1/x" + b"GET /v1", GET % b"/free/x" + b"GET /v1"]
)
def test_a_slow_head_ends_its_connection(shop: Shop, customer: Customer, piece: bytes) -> None:
    """A head that has begun has `head_seconds`, however many bytes still come."""
    begun = time.monotonic()
    with connect(shop.url) as client:
        client.sendall(piece)
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 20:
                time.sleep(0.1)
                client.sendall(b"x")
    assert time.monotonic() - begun < 6
    assert customer.get("/v1/x").status_code == 200


def test_an_incomplete_head_fills_no_memory(shop: Shop) -> None:
    """Fields without an end, each within the limit of a line, end the connection at four times that limit."""
    with connect(shop.url) as client:
        client.sendall(b"GET /v1/x HTTP/1.1\r\n")
        sent = 0
        with contextlib.suppress(OSError):
            for _ in range(60):
                client.sendall(b"X: " + b"y" * 7000 + b"\r\n")
                sent += 7000
                time.sleep(0.01)
    assert sent < 100_000


def test_a_slow_body_is_given_up(shop: Shop, raw: RawUpstream, customer: Customer) -> None:
    """A priced body that stops gets an answer in `idle_seconds`; nothing is charged before it is there."""
    payment = customer.headers("/v1/x", 25)["PAYMENT-SIGNATURE"].encode()
    calls = len(raw.targets)
    head = b"POST /v1/x HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 100\r\nPAYMENT-SIGNATURE: " + payment
    assert statuses(exchange(shop.url, head + b"\r\n\r\nhalf")) == [400]
    assert len(raw.targets) == calls
    customer.paid_sat = OPENING_SAT
    assert customer.record() == (OPENING_SAT, OPENING_SAT)


def test_a_large_body_that_stops_leaves_credit(shop: Shop, raw: RawUpstream, customer: Customer) -> None:
    """A body that passes in chunks is charged before; when it stops, the price is credit and the upstream is free."""
    payment = customer.headers("/v1/x", 25)["PAYMENT-SIGNATURE"].encode()
    head = b"POST /v1/x HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 1000000\r\nPAYMENT-SIGNATURE: " + payment
    assert statuses(exchange(shop.url, head + b"\r\n\r\n" + bytes(1000))) in ([502], [504])
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT)
    assert raw.confused == []


def test_a_client_that_reads_nothing_fills_no_memory(shop: Shop, customer: Customer) -> None:
    """Offers that a client does not read are not made: the server reads no further request of it."""
    before = resident_mb(shop)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(deaf(shop)) for _ in range(2)]
        for _ in range(4000):
            for client in clients:
                time.sleep(0.0002)  # each request in a piece of its own
                with contextlib.suppress(OSError):
                    client.send(GET % b"/v1/x")
        assert customer.get("/v1/x").status_code == 200
        print("GREW", resident_mb(shop) - before)
        assert resident_mb(shop) - before < 4


@contextlib.contextmanager
def deaf(shop: Shop) -> Iterator[socket.socket]:
    host, port = httpx.URL(shop.url).host, httpx.URL(shop.url).port
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect((host, port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setblocking(False)
    with client:
        yield client


def resident_mb(shop: Shop) -> float:
    assert shop.system.server is not None
    return int(Path(f"/proc/{shop.system.server.process.pid}/statm").read_text().split()[1]) * 4096 / 1e6
