"""SIGKILL of the server at each step of a paid request: the payer repeats it, and has one delivery for one price."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from paychan.protocol.wire import x402
from paychan.protocol.wire.x402_json import read_required
from tests.gateway.rawupstream import OK
from tests.gateway.shop import OPENING_SAT, PRICES, Bill, Customer, Shop, open_shop
from tests.lib.campaign import sized
from tests.lib.customer import wait_for
from tests.lib.restoring import back_up, lose_and_restore
from tests.lib.system import System

ROUNDS = sized(4, campaign=100)
PAYERS = 3
RELEASES = sized(3, campaign=30)


class Dark:
    """An upstream whose connections wait in the kernel until `accept`: the gateway can't send its request yet."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.fillers = [socket.socket() for _ in range(4)]
        for each in self.fillers:
            each.setblocking(False)
            each.connect_ex(self.listener.getsockname())
        self.served = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def accept(self) -> None:
        """Serve each connection from now on."""
        for each in self.fillers:
            each.close()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(65536).startswith(b"GET /dark"):
                    self.served += 1
                    connection.sendall(OK)


@pytest.fixture(scope="module")
def dark() -> Iterator[Dark]:
    upstream = Dark()
    yield upstream
    for each in (upstream.listener, *upstream.fillers):
        each.close()


@pytest.fixture(scope="module")
def shop(dark: Dark, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    route = f'[[route]]\npath = "/dark/**"\nprice_sat = 25\nconnect_seconds = 60\nupstream = "{dark.url}"\n'
    with open_shop(tmp_path_factory.mktemp("kills"), PRICES.replace("_seconds = 2", "_seconds = 30") + route) as opened:
        keep_ports(opened.system)
        opened.http.headers["Host"] = "shop.example"
        yield opened


def keep_ports(system: System) -> None:
    """Give a restarted server the ports of the present one: the offers name them."""
    assert system.running is not None
    http, gateway = (url.rsplit(":", 1)[1] for url in (system.running.url, system.running.gateway_url))
    text = system.server_file.read_text().replace("[http]\nport = 0", f"[http]\nport = {http}")
    system.server_file.write_text(text.replace("[gateway]\nport = 0", f"[gateway]\nport = {gateway}"))


@pytest.fixture
def customer(shop: Shop) -> Customer:
    shop.upstream.gate.set()
    return Customer(shop)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def start(shop: Shop) -> None:
    """Start the server, and wait until it sells: it must have asked the signer for its identity key."""
    shop.system.start_server()
    wait_for(lambda: shop.get("/v1/x").status_code == 402, "the gateway sells")


def begin(pool: ThreadPoolExecutor, shop: Shop, path: str, headers: dict[str, str]) -> Future[httpx.Response]:
    return pool.submit(httpx.get, shop.url + path, headers={"Host": "shop.example", **headers}, timeout=60)


def test_killed_between_booking_and_upstream(
    shop: Shop, customer: Customer, dark: Dark, pool: ThreadPoolExecutor
) -> None:
    """The charge is on disk, the upstream saw nothing: the repetition is served for the same charge."""
    headers = customer.headers("/dark/x", 25)
    lost = begin(pool, shop, "/dark/x", headers)
    wait_for(lambda: customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25), "booked")
    assert dark.served == 0
    shop.system.kill_server()
    assert isinstance(lost.exception(30), httpx.TransportError)
    dark.accept()
    start(shop)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)
    again = shop.get("/dark/x", headers=headers)
    assert (again.text, Bill(again).charged_sat) == ("ok", 25)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)
    assert dark.served == 1


def test_killed_between_upstream_and_answer(shop: Shop, customer: Customer, pool: ThreadPoolExecutor) -> None:
    """The upstream has worked in vain; it works again for the repetition, for the same charge."""
    calls = len(shop.upstream.calls)
    headers = customer.headers("/v1/slow", 25)
    shop.upstream.gate.clear()
    lost = begin(pool, shop, "/v1/slow", headers)
    wait_for(lambda: len(shop.upstream.calls) == calls + 1, "the upstream works")
    shop.system.kill_server()
    assert isinstance(lost.exception(30), httpx.TransportError)
    shop.upstream.gate.set()
    start(shop)
    again = shop.get("/v1/slow", headers=headers)
    assert (again.status_code, Bill(again).charged_sat) == (200, 25)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)
    assert len(shop.upstream.calls) == calls + 2


def test_killed_in_the_middle_of_a_body(shop: Shop, customer: Customer) -> None:
    """The payer sees that the body is not whole, and gets a whole one for the same charge."""
    headers = customer.headers("/v1/big/40", 25)
    with shop.http.stream("GET", shop.url + "/v1/big/40", headers=headers) as part:
        pieces = part.iter_bytes()
        assert next(pieces)
        shop.system.kill_server()
        with pytest.raises(httpx.TransportError):
            list(pieces)
    start(shop)
    again = shop.get("/v1/big/40", headers=headers)
    assert (len(again.content), Bill(again).charged_sat) == (40_000_000, 25)
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


def test_killed_while_releasing(shop: Shop, customer: Customer, pool: ThreadPoolExecutor) -> None:
    """Either the charge or the credit is on disk; a repetition that fails again leaves the credit, never less."""
    moments = random.Random(14)
    credit = 0
    for number in range(RELEASES):
        path = f"/v1/drop/head?{number}"
        headers = customer.headers(path, 25)
        lost = begin(pool, shop, path, headers)
        time.sleep(moments.uniform(0, 0.02))
        shop.system.kill_server()
        lost.exception(30)
        start(shop)
        answer = shop.get(path, headers=headers)
        credit += 25
        assert (answer.status_code, Bill(answer).charged_sat, Bill(answer).state.credit_sat) == (502, 0, credit)
        assert customer.record() == (OPENING_SAT + credit, OPENING_SAT)
    assert customer.get("/v1/x", 0).status_code == 200


def test_random_kills_leave_every_payer_whole(shop: Shop, pool: ThreadPoolExecutor) -> None:
    """Payers pay one request after another while the server is killed; each lost one is repeated.

    At the end each payer has as many answers as prices, and accepted, spent and the payer's own sum agree.
    """
    moments = random.Random(41)
    customers = [Customer(shop) for _ in range(PAYERS)]
    found = x402.offers(read_required(shop.get("/v1/x").headers["PAYMENT-REQUIRED"]))[0]
    answered = 0

    clients = [httpx.Client(headers={"Host": "shop.example"}, timeout=30, verify=False) for _ in customers]

    def pay(customer: Customer, http: httpx.Client, number: int) -> int:
        """Pay until the server is gone; return the number of answers, with that of the lost request's repetition."""
        count = 0
        while True:
            customer.paid_sat += 25
            header = {"PAYMENT-SIGNATURE": x402.payment_header(found, customer.voucher())}
            url = f"{shop.url}/v1/round/{number}/{count}"
            try:
                answer = http.get(url, headers=header)
            except httpx.TransportError:
                is_up.wait(60)
                answer = http.get(url, headers=header)
                assert answer.status_code == 200, answer.text
                assert Bill(answer).charged_sat == 25
                return count + 1
            assert answer.status_code == 200, answer.text
            count += 1

    is_up = threading.Event()
    for number in range(ROUNDS):
        is_up.clear()
        running = [pool.submit(pay, *each, number) for each in zip(customers, clients, strict=True)]
        time.sleep(moments.uniform(0.05, 0.3))
        shop.system.kill_server()
        start(shop)
        is_up.set()
        answered += sum(each.result(60) for each in running)
    for client in clients:
        client.close()
    for customer in customers:
        assert customer.record() == (customer.paid_sat, customer.paid_sat)
    assert sum(customer.paid_sat - OPENING_SAT for customer in customers) == 25 * answered
    assert answered > 2 * ROUNDS * PAYERS


def test_a_payment_by_the_old_price_list_is_refused(shop: Shop, customer: Customer) -> None:
    """The price changed with a restart: the refusal has the new offer, and nothing was booked."""
    file = shop.system.directory / "prices.toml"
    old, headers = file.read_text(), customer.headers("/v1/x", 25)
    file.write_text(old.replace("price_sat = 25", "price_sat = 30"))
    shop.system.kill_server()
    start(shop)
    calls = len(shop.upstream.calls)
    refused = shop.get("/v1/x", headers=headers)
    assert (refused.status_code, refused.json()["code"], refused.json()["priceSat"]) == (402, "offer_mismatch", 30)
    assert len(shop.upstream.calls) == calls
    customer.paid_sat = OPENING_SAT
    assert customer.record() == (OPENING_SAT, OPENING_SAT)
    answer = customer.get("/v1/x", 30)
    assert (answer.status_code, Bill(answer).charged_sat) == (200, 30)
    file.write_text(old)
    shop.system.kill_server()
    start(shop)


def test_a_restored_backup_gives_no_service_for_nothing(shop: Shop, customer: Customer) -> None:
    """The payer's next payment brings all that it ever paid; it pays for its request, and the rest counts as spent."""
    for number in range(2):
        assert customer.get(f"/v1/before/{number}").status_code == 200
    at_backup = customer.record()
    backup = back_up(shop.system)
    charged_since = 3 * 25
    for number in range(3):
        assert customer.get(f"/v1/after/{number}", 30).status_code == 200
    accepted, spent = customer.record()
    assert (accepted - spent, spent - at_backup[1]) == (15, charged_since)
    lose_and_restore(shop.system, backup)
    wait_for(lambda: shop.get("/v1/x").status_code == 402, "the gateway sells")

    answer = customer.get("/v1/again", 25)
    assert (answer.status_code, Bill(answer).charged_sat) == (200, 25)
    paid, charged = customer.record()
    assert paid == charged == accepted + 25
    assert Bill(answer).state.credit_sat == 0
    assert customer.get("/v1/next", 25).status_code == 200
