"""Answers that are charged unit by unit: events, bytes, kilobytes, seconds, messages of a WebSocket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from websockets.sync.client import connect

from tests.gateway.shop import OPENING_SAT, Bill, Customer, Shop, open_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(tmp_path_factory.mktemp("metered")) as opened:
        yield opened


@pytest.fixture
def customer(shop: Shop) -> Customer:
    return Customer(shop)


def events(text: str) -> list[tuple[str, str]]:
    """Name and data of each event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", "message"), fields["data"]))
    return found


@pytest.mark.parametrize("way", ["x402", "mpp"])
def test_each_event_is_charged(shop: Shop, customer: Customer, way: str) -> None:
    """Ten events of 5 sat; the receipt is the last event, and what was not used is credit."""
    answer = customer.get("/events/sse/10", 60, way)
    *messages, (last, receipt) = events(answer.text)
    assert messages == [("message", str(number)) for number in range(10)]
    assert last == "payment-receipt"
    assert json.loads(receipt)["charged"] == "50"
    assert customer.record() == (OPENING_SAT + 60, OPENING_SAT + 50)


def test_a_stream_without_credit_asks_for_a_payment_and_goes_on(shop: Shop, customer: Customer) -> None:
    """The payer pays by a second request, a HEAD, while the stream waits; no event is lost or sent unpaid."""
    headers = customer.headers("/patient/sse/6", 15)
    names = []
    with shop.http.stream("GET", shop.url + "/patient/sse/6", headers=headers) as answer:
        assert Bill(answer).charged_sat == 5
        text = ""
        for piece in answer.iter_text():
            text += piece
            if text.count("payment-need-voucher") > len(names):
                need = json.loads([data for name, data in events(text) if name == "payment-need-voucher"][-1])
                assert int(need["requiredCumulative"]) == int(need["acceptedCumulative"]) + 5
                names.append(need)
                more = httpx.head(shop.url + "/patient/sse/6", headers=customer.headers("/patient/sse/6", 15))
                assert more.status_code == 204
    got = events(text)
    assert [data for name, data in got if name == "message"] == [str(number) for number in range(6)]
    assert len(names) == 1
    assert got[3][0] == "payment-need-voucher"
    assert customer.record() == (OPENING_SAT + 30, OPENING_SAT + 30)


def test_a_stream_that_nobody_pays_ends(shop: Shop, customer: Customer) -> None:
    """After the pause the answer ends; what was paid was sent, and not more."""
    answer = customer.get("/events/sse/50", 10)
    got = events(answer.text)
    assert [name for name, _ in got] == ["message", "message", "payment-need-voucher"]
    assert customer.record() == (OPENING_SAT + 10, OPENING_SAT + 10)


@pytest.mark.parametrize(
    ("path", "paid", "size"), [("/short-kilobytes/big/1", 30, 10_000), ("/short-bytes/big/1", 777, 777)]
)
def test_bytes_are_sent_as_far_as_they_are_paid(
    shop: Shop, customer: Customer, path: str, paid: int, size: int
) -> None:
    """The answer pauses at the last paid byte, and ends there if nothing more comes."""
    answer = customer.get(path, paid)
    assert len(answer.content) == size
    assert customer.record() == (OPENING_SAT + paid, OPENING_SAT + paid)


def test_a_whole_answer_by_the_kilobyte(shop: Shop, customer: Customer) -> None:
    """A kilobyte that is begun counts."""
    answer = customer.get("/kilobytes/big/1", 3_500)
    assert len(answer.content) == 1_000_000
    assert customer.record() == (OPENING_SAT + 3_500, OPENING_SAT + 3_000)


def test_seconds_are_charged_while_the_answer_passes(shop: Shop, customer: Customer) -> None:
    """An answer of less than a second costs one."""
    assert len(customer.get("/seconds/big/1", 10).content) == 1_000_000
    accepted, spent = customer.record()
    assert accepted == OPENING_SAT + 10
    assert 2 <= spent - OPENING_SAT <= 10
    assert (spent - OPENING_SAT) % 2 == 0


def test_messages_of_a_websocket_are_charged(shop: Shop, customer: Customer) -> None:
    """The upgrade costs one unit, which the first message uses; a payment comes as a message and not to the service."""
    url = shop.url.replace("http", "ws") + "/patient/ws/4"
    with connect(url, additional_headers=customer.headers("/patient/ws/4", 10), subprotocols=["chat"]) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == "chat"
        socket.send("hi")
        assert [socket.recv(10) for _ in range(2)] == ["0 hi", "1 hi"]
        need = json.loads(socket.recv(10))
        assert need["mpp"] == "payment-need-voucher"
        paying = customer.headers("/patient/ws/4", 10, way="mpp")["Authorization"]
        socket.send(json.dumps({"mpp": "authorization", "authorization": paying}))
        assert [socket.recv(10) for _ in range(2)] == ["2 hi", "3 hi"]
    assert customer.record() == (OPENING_SAT + 20, OPENING_SAT + 20)


def test_a_websocket_at_a_fixed_price(shop: Shop, customer: Customer) -> None:
    """An upgrade of a route by the request is charged once; the refused upgrade of a service is credit."""
    url = shop.url.replace("http", "ws")
    with connect(url + "/v1/ws/1", additional_headers=customer.headers("/v1/ws/1", 25)) as socket:
        socket.send("a")
        assert socket.recv(10) == "0 a"
    refused = shop.get(
        "/v1/status/404",
        headers={
            **customer.headers("/v1/status/404", 25),
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        },
    )
    assert refused.status_code == 502
    assert customer.record() == (OPENING_SAT + 50, OPENING_SAT + 25)


def test_parallel_requests_get_what_was_paid(shop: Shop, customer: Customer) -> None:
    """Twenty requests at once with one payment for eight: eight answers, and nothing is charged twice."""
    headers = customer.headers("/v1/x", 200)
    got: list[int] = []

    def ask(number: int) -> None:
        got.append(httpx.get(f"{shop.url}/v1/x?{number}", headers=headers, timeout=30).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [200] * 8 + [402] * 12
    assert customer.record() == (OPENING_SAT + 200, OPENING_SAT + 200)


def test_a_payer_that_leaves_before_the_answer_gets_its_price_back(shop: Shop, customer: Customer) -> None:
    """The service was slow and the payer has gone: nothing was delivered."""
    headers = customer.headers("/v1/slow", 25)
    shop.upstream.gate.clear()
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(shop.url + "/v1/slow", headers=headers, timeout=0.3)
    finally:
        shop.upstream.gate.set()
    ends = time.monotonic() + 30
    while customer.record() != (OPENING_SAT + 25, OPENING_SAT):
        assert time.monotonic() < ends
