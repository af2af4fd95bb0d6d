"""The gateway in front of a service that never heard of payments: real server, real sockets, real payments."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.gateway.shop import OPENING_SAT, PRICE_SAT, Bill, Customer, Shop, open_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(tmp_path_factory.mktemp("shop")) as opened:
        yield opened


@pytest.fixture
def customer(shop: Shop) -> Customer:
    return Customer(shop)


@pytest.mark.parametrize("way", ["x402", "mpp"])
def test_a_paid_request_reaches_the_service_and_an_unpaid_one_does_not(shop: Shop, way: str) -> None:
    """The service sees the request as it was sent, with the channel and without the payment; the payer sees its bill."""
    calls = len(shop.upstream.calls)
    assert shop.get("/v1/tile/5?z=3").status_code == 402
    assert len(shop.upstream.calls) == calls
    customer = Customer(shop)
    answer = customer.get("/v1/tile/5?z=3", way=way, **{"X-Own": "yes", "X-Paychan-Credit": "1000000"})

    assert answer.status_code == 200
    assert answer.json() == {"path": "/v1/tile/5?z=3", "method": "GET", "body": ""}
    assert answer.headers["X-Shop"] == "yes"
    assert (Bill(answer).charged_sat, Bill(answer).state.credit_sat) == (PRICE_SAT, 0)
    assert answer.headers["Cache-Control"] == "private"
    seen = shop.seen()
    assert (seen["x-own"], seen["x-paychan-channel"]) == (["yes"], [str(customer.payer.outpoint)])
    assert (seen["x-paychan-charged"], seen["x-paychan-credit"]) == (["25"], ["0"])
    assert not {"payment-signature", "authorization", "accept-payment"} & set(seen)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


def test_another_scheme_of_authorization_passes(shop: Shop, customer: Customer) -> None:
    """The service's own bearer token is its business; the payment goes into a field of its own."""
    headers = customer.headers("/v1/x", 25, way="mpp")
    answer = shop.get(
        "/v1/x", headers={"Payment-Authorization": headers["Authorization"], "Authorization": "Bearer abc"}
    )
    assert answer.status_code == 200
    assert shop.seen()["authorization"] == ["Bearer abc"]


def test_free_paths_pass_and_unknown_ones_do_not(shop: Shop) -> None:
    """A free path has no payment headers; a path that the list does not name never reaches the service."""
    answer = shop.get("/free/page", headers={"X-Paychan-Channel": "spoofed"})
    assert answer.status_code == 200
    assert "x-paychan-channel" not in shop.seen()
    calls = len(shop.upstream.calls)
    assert shop.get("/elsewhere").status_code == 404
    assert len(shop.upstream.calls) == calls


def test_a_lost_answer_is_sent_again(shop: Shop, customer: Customer) -> None:
    """The repeated request is not charged again, and the service does not work again."""
    headers = customer.headers("/v1/once", 25)
    first = shop.get("/v1/once", headers=headers)
    calls = len(shop.upstream.calls)
    again = shop.get("/v1/once", headers=headers)
    assert (again.status_code, again.content, again.headers["X-Shop"]) == (200, first.content, "yes")
    assert len(shop.upstream.calls) == calls
    assert Bill(again).charged_sat == 25
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)
    other = shop.get("/v1/other", headers=headers)
    assert other.status_code == 402
    assert len(shop.upstream.calls) == calls


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/status/500", 500), ("/v1/status/503", 503), ("/v1/hang", 504), ("/v1/drop/head", 502), ("/v1/garbage", 502)],
)
def test_nothing_delivered_is_credit_again(shop: Shop, customer: Customer, path: str, status: int) -> None:
    """The answer says so, and the next request is paid from the credit with the same payment."""
    answer = customer.get(path)
    assert answer.status_code == status
    assert (Bill(answer).charged_sat, Bill(answer).state.credit_sat) == (0, 25)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT)
    assert customer.get("/v1/tile", 0).status_code == 200


def test_a_clients_error_is_delivered(shop: Shop, customer: Customer) -> None:
    """404 is an answer, and was paid."""
    answer = customer.get("/v1/status/404")
    assert (answer.status_code, Bill(answer).charged_sat) == (404, 25)


def test_a_body_that_ends_too_early_ends_the_connection(shop: Shop, customer: Customer) -> None:
    """The payer sees that the body is not whole; what was delivered in part stays charged."""
    with pytest.raises(httpx.RemoteProtocolError):
        customer.get("/v1/drop/body")
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


@pytest.mark.parametrize(("told", "charged"), [("17", 17), ("0", 0), ("40", 40), ("41", 40), ("nonsense", 40)])
def test_the_service_says_the_price_up_to_the_ceiling(shop: Shop, customer: Customer, told: str, charged: int) -> None:
    """The ceiling is charged before the work, and the rest is credit before the payer hears of it."""
    answer = customer.get(f"/told/price/{told}", 40)
    assert answer.status_code == 200
    assert "X-Paychan-Price" not in answer.headers
    assert (Bill(answer).charged_sat, Bill(answer).state.credit_sat) == (charged, 40 - charged)
    assert customer.record() == (OPENING_SAT + 40, OPENING_SAT + charged)


def test_a_payer_that_lost_its_state_is_corrected(shop: Shop, customer: Customer) -> None:
    """The refusal has the newest payment with the payer's own signature; with it the payer goes on after one retry."""
    from paychan.protocol.wire import x402
    from paychan.protocol.wire.x402_json import read_required

    customer.get("/v1/a", 1000)
    newest = customer.payer.payment(customer.paid_sat)
    customer.paid_sat = OPENING_SAT
    refused = customer.get("/v1/b", 25)
    assert refused.status_code == 402
    state = x402.offers(read_required(refused.headers["PAYMENT-REQUIRED"]))[0].state
    assert state is not None
    assert state.newest == newest
    assert (state.accepted_sat, state.credit_sat) == (OPENING_SAT + 1000, 975)
    customer.paid_sat = state.accepted_sat
    assert customer.get("/v1/b", 0).status_code == 200


def test_a_closed_channel_is_no_part_of_the_next_offer(shop: Shop, customer: Customer) -> None:
    """The payer closes through the gateway; afterwards its payment is refused without the channel."""
    from paychan.protocol.wire import x402
    from paychan.protocol.wire.x402_json import read_required

    assert customer.get("/v1/a").status_code == 200
    closing = customer.headers("/v1/a", close=True)
    assert shop.get("/v1/a", headers=closing).status_code == 204
    refused = customer.get("/v1/b", 25)
    assert refused.status_code == 402
    assert x402.offers(read_required(refused.headers["PAYMENT-REQUIRED"]))[0].state is None


def test_bodies_pass_in_both_directions(shop: Shop, customer: Customer) -> None:
    """A small body is a part of the request's id; a large one passes in chunks."""
    small = shop.http.post(shop.url + "/v1/echo", headers=customer.headers("/v1/echo", 25), content=b"abc")
    assert small.json()["body"] == "abc"
    large = shop.http.post(
        shop.url + "/v1/upload", headers=customer.headers("/v1/upload", 25), content=iter([bytes(100_000)] * 30)
    )
    assert large.json() == {"size": 3_000_000}
    with shop.http.stream("GET", shop.url + "/v1/big/20", headers=customer.headers("/v1/big/20", 25)) as answer:
        assert sum(len(chunk) for chunk in answer.iter_bytes()) == 20_000_000


def test_head_passes_without_a_body(shop: Shop, customer: Customer) -> None:
    """A HEAD is charged like the GET whose head it gets."""
    answer = shop.http.head(shop.url + "/v1/x", headers=customer.headers("/v1/x", 25))
    assert (answer.status_code, answer.content, Bill(answer).charged_sat) == (200, b"", 25)


def test_expectations_are_answered_by_the_gateway(shop: Shop, customer: Customer) -> None:
    """An unpaid request with Expect gets its 402 without the body; a paid one is asked for it."""
    import socket
    from urllib.parse import urlsplit

    where = urlsplit(shop.url)
    payment = customer.headers("/v1/echo", 25)["PAYMENT-SIGNATURE"]
    for header, first in (("", b"HTTP/1.1 402"), (f"PAYMENT-SIGNATURE: {payment}\r\n", b"HTTP/1.1 100")):
        with socket.create_connection((where.hostname, where.port), 20) as client:
            head = f"POST /v1/echo HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 3\r\nExpect: 100-continue\r\n{header}\r\n"
            client.sendall(head.encode())
            assert client.recv(12) == first
            if header:
                client.sendall(b"abc")
                answer = b""
                while b"abc" not in answer:
                    got = client.recv(65536)
                    assert got
                    answer += got
                assert b"HTTP/1.1 200" in answer


def test_a_repetition_takes_back_nothing_that_was_delivered(shop: Shop, customer: Customer) -> None:
    """An answer too large to be kept is delivered again a few times, then no more; a repetition that fails is no refund."""
    path = "/v1/big/2?again"
    headers = customer.headers(path, 25)
    for _ in range(3):
        assert len(shop.get(path, headers=headers).content) == 2_000_000
    refused = shop.get(path, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "already_delivered")
    other = customer.headers("/v1/big/2?fails", 25)
    assert shop.get("/v1/big/2?fails", headers=other).status_code == 200
    shop.upstream.fails.add("/v1/big/2?fails")
    failed = shop.get("/v1/big/2?fails", headers=other)
    assert (failed.status_code, Bill(failed).charged_sat) == (500, 25)
    assert customer.record() == (OPENING_SAT + 50, OPENING_SAT + 50)


@pytest.mark.parametrize("told", [17, 0])
def test_a_repetition_of_a_told_price_costs_that_price(shop: Shop, customer: Customer, told: int) -> None:
    """The ceiling is not charged for an answer that is sent again."""
    headers = customer.headers(f"/told/price/{told}", 40)
    for _ in range(2):
        answer = shop.get(f"/told/price/{told}", headers=headers)
        assert (answer.status_code, Bill(answer).charged_sat) == (200, told)
    assert customer.record() == (OPENING_SAT + 40, OPENING_SAT + told)


def test_a_repetition_that_is_refused_costs_nothing(shop: Shop, customer: Customer) -> None:
    """The record forgot the request, as 70 newer ones were answered; the gateway still knows that it was delivered."""
    path, name = "/v1/big/2?named", "the-first-request"
    customer.paid_sat += 80 * 25
    for _ in range(3):
        assert shop.get(path, headers=customer.headers(path, name=name)).status_code == 200
    for number in range(70):
        assert shop.get("/v1/x", headers=customer.headers("/v1/x", name=f"another-request-{number}")).status_code == 200
    spent = customer.record()[1]
    refused = shop.get(path, headers=customer.headers(path, name=name))
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "already_delivered")
    assert customer.record()[1] == spent == OPENING_SAT + 71 * 25
