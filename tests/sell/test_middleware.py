"""The middleware in three frameworks: what payer and seller are left with, in success, trouble and abuse."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import pytest

from tests.sell.programs import PROGRAMS, Controls, until
from tests.sell.shop import Customer, Shop, raw, settled


@pytest.fixture(scope="module")
def controls() -> Controls:
    return Controls()


@pytest.fixture(scope="module", params=PROGRAMS)
def url(request: pytest.FixtureRequest, shop: Shop, controls: Controls) -> Iterator[str]:
    """The program in each framework."""
    with PROGRAMS[request.param](controls, shop.socket) as found:
        yield found


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


@pytest.mark.parametrize("way", ["x402", "mpp"])
def test_a_handler_sees_the_charge_and_no_payment(url: str, customer: Customer, way: str) -> None:
    """Payments and forged headers are gone from the request, forged receipts from the answer."""
    forged = {"X-Paychan-Credit": "1000000", "X-Paychan-Channel": "x", "Idempotency-Key": '"a"'}
    answer = customer.get(url + "/tile", 40, way, headers=forged)
    assert answer.status_code == 200
    seen = answer.json()
    assert (seen["channel"], seen["charged"], seen["credit"]) == (str(customer.payer.outpoint), 25, 15)
    assert not [name for name in seen["headers"] if name.startswith(("payment", "x-paychan", "authorization"))]
    assert "idempotency-key" in seen["headers"]
    assert settled(answer).charged_sat == 25
    assert (answer.headers["Cache-Control"], "forged" in str(answer.headers)) == ("private", False)
    assert customer.sums() == (40, 25)


def test_an_unpriced_handler_is_free_and_sees_no_forged_header(url: str, controls: Controls) -> None:
    """A route without a price runs without a payment; an unpaid request runs no priced handler."""
    seen = raw(url + "/free", headers={"X-Paychan-Credit": "5", "Authorization": "Bearer own"}).json()
    assert (seen["channel"], seen["charged"]) == ("", 0)
    assert "authorization" in seen["headers"]
    calls = controls.calls
    assert raw(url + "/tile").status_code == 402
    assert controls.calls == calls


@pytest.mark.parametrize("path", ["/fail", "/status/503"])
def test_what_was_not_delivered_is_credit(url: str, customer: Customer, path: str) -> None:
    """An error of the handler and a status of 500 or above give the price back; it pays the next request."""
    answer = customer.get(url + path)
    assert answer.status_code in (500, 503)
    assert customer.sums() == (25, 0)
    if path != "/fail":
        assert settled(answer).state.credit_sat == 25
    assert customer.get(url + "/tile", 0).status_code == 200
    assert customer.sums() == (25, 25)


def test_a_status_below_500_is_paid(url: str, customer: Customer) -> None:
    """The handler decided about the request: that is an answer."""
    assert settled(customer.get(url + "/status/404")).charged_sat == 25
    assert customer.sums() == (25, 25)


@pytest.mark.parametrize(
    ("path", "cost_sat"),
    [
        ("/chat", 37),
        ("/told?say=" + quote('{"amount": "40"}'), 40),
        ("/told?say=" + quote('{"amount": "40%"}'), 200),
        ("/told?say=" + quote('{"amount": "501"}'), 500),
        ("/told?say=garbage", 500),
    ],
)
def test_a_ceiling_is_reserved_and_the_cost_is_charged(url: str, customer: Customer, path: str, cost_sat: int) -> None:
    """The rest of the ceiling is credit again, and the answer says the cost."""
    answer = customer.get(url + path, 500)
    assert (answer.status_code, settled(answer).charged_sat) == (200, cost_sat)
    assert "settlement-overrides" not in answer.headers
    assert customer.sums() == (500, cost_sat)


def test_a_price_function_decides_by_the_request(url: str, customer: Customer, controls: Controls) -> None:
    """A price of 0 is free; a price that changes meanwhile is a new offer, and nothing is charged."""
    assert raw(url + "/by?n=0").status_code == 200
    assert raw(url + "/by?n=3").json()["priceSat"] == 75
    payment = customer.headers(raw(url + "/by?n=3"), 75)
    controls.price_sat = 26
    try:
        assert code(raw(url + "/by?n=3", headers=payment)) == (402, "offer_mismatch")
    finally:
        controls.price_sat = 25
    assert customer.sums() == (0, 0)
    assert raw(url + "/by?n=3", headers=payment).status_code == 200
    assert customer.sums() == (75, 75)


def test_bad_payments_change_nothing(url: str, customer: Customer, controls: Controls) -> None:
    """Both ways at once, garbage, and a payment for another price run no handler."""
    offered = raw(url + "/tile")
    x402, mpp = customer.headers(offered, 25), customer.headers(offered, 0, "mpp")
    calls = controls.calls
    assert code(raw(url + "/tile", headers={**x402, **mpp})) == (400, "two_payments")
    assert code(raw(url + "/tile", headers={"PAYMENT-SIGNATURE": "????"})) == (402, "malformed_payment")
    assert code(raw(url + "/tile", headers={"Authorization": "Payment ????"})) == (402, "malformed_payment")
    assert code(raw(url + "/chat", headers=x402)) == (402, "offer_mismatch")
    assert (controls.calls, customer.sums()) == (calls, (0, 0))


def test_a_replay_is_served_a_few_times_and_another_route_needs_another_payment(
    url: str, customer: Customer, controls: Controls
) -> None:
    """One charge: the repetitions cost nothing, then 409; the payment for another URL is refused."""
    headers = customer.headers(raw(url + "/tile"))
    calls = controls.calls
    for _ in range(3):  # 409 until the server knows that the answer before has left
        until(lambda: raw(url + "/tile", headers=headers).status_code == 200)
        assert customer.sums() == (25, 25)
    until(lambda: code(raw(url + "/tile", headers=headers)) == (409, "already_delivered"))
    assert code(raw(url + "/status/200", headers=headers)) == (402, "credit_too_low")
    assert (controls.calls - calls, customer.sums()) == (3, (25, 25))


def test_requests_at_once_get_what_was_paid(url: str, customer: Customer, controls: Controls) -> None:
    """Ten requests with the payment for four: four answers. The same request twice at once is served once."""
    offered = raw(url + "/by?n=1")
    headers = customer.headers(offered, 100)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda n: raw(f"{url}/by?n=1&{n}", headers=headers).status_code, range(10)))
    assert sorted(answers) == [200] * 4 + [402] * 6
    assert customer.sums() == (100, 100)

    headers = customer.headers(raw(url + "/slow"))
    controls.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(raw, url + "/slow", headers=headers)
        assert controls.entered.acquire(timeout=30)
        assert code(raw(url + "/slow", headers=headers)) == (409, "request_under_way")
        controls.gate.set()
        assert first.result().status_code == 200
    assert customer.sums() == (125, 125)


@pytest.mark.parametrize("size", [0, 1_000, 200_000])
def test_bodies_arrive_whole(url: str, customer: Customer, size: int) -> None:
    """A body that was read for its digest reaches the handler; so does one that is too long for that."""
    body = bytes(range(256)) * (size // 256 + 1)
    answer = customer.get(url + "/echo", method="POST", content=body[:size])
    assert (answer.status_code, answer.content) == (200, body[:size])
    assert customer.sums() == (25, 25)


def test_answers_pass_as_they_come(url: str, customer: Customer, controls: Controls) -> None:
    """The first part of a stream arrives before the program makes the second."""
    headers = customer.headers(raw(url + "/stream"))
    controls.gate.clear()
    with httpx.stream("GET", url + "/stream", headers=headers, timeout=30, trust_env=False) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b"first"
        controls.gate.set()
        assert b"".join(parts) == b"second"
    assert customer.sums() == (25, 25)


def test_a_payer_that_leaves_before_the_first_byte_has_credit(url: str, customer: Customer, controls: Controls) -> None:
    """The handler works on, and nothing is charged. A WSGI server notices when it can't send."""
    headers = customer.headers(raw(url + "/slow?gone"))
    controls.gate.clear()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as gone:
        lines = [f"GET /slow?gone HTTP/1.1\r\nHost: {host}:{port}\r\n", *(f"{k}: {v}\r\n" for k, v in headers.items())]
        gone.sendall("".join([*lines, "\r\n"]).encode())
        assert controls.entered.acquire(timeout=30)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, as of a lost peer
    assert raw(url + "/free").status_code == 200  # an event loop has seen the reset by then
    controls.gate.set()
    until(lambda: customer.sums() == (25, 0))


@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_a_server_nothing_is_free_unless_the_seller_says_so(
    name: str, is_free: bool, tmp_path_factory: pytest.TempPathFactory, controls: Controls
) -> None:
    """A server that is away: 503 with Retry-After, and no handler runs."""
    calls = controls.calls
    place = str(tmp_path_factory.mktemp("away") / "merchant.sock")
    with PROGRAMS[name](controls, place, free_when_away=is_free) as url:
        if is_free:
            assert raw(url + "/by").status_code == 200
            return
        answer = raw(url + "/tile")
        assert code(answer) == (503, "payments_away")
        assert answer.headers["Retry-After"] == "5"
    assert controls.calls == calls
