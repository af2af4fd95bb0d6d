"""Strangers are cheap: what they send costs no signer, no disk and no memory, and keeps no payer out."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.wire import connect
from tests.gateway.shop import OPENING_SAT, PRICES, Bill, Customer, Shop, open_shop
from tests.gateway.test_hostile import signature_of_another
from tests.lib.campaign import sized

FILES = 256
MEGABYTES = sized(200, campaign=1000)
MOST_GROWTH_MB = 50
"""A body of this size in memory would show; buffers of sockets and streams are below a tenth of it."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    http = {"http": "idle_seconds = 600\nhead_seconds = 300"}
    prices = PRICES.replace("_seconds = 2", "_seconds = 60")
    with open_shop(tmp_path_factory.mktemp("strangers"), prices, http, {resource.RLIMIT_NOFILE: FILES}) as opened:
        yield opened


def written(shop: Shop) -> dict[str, tuple[int, int]]:
    """Sizes and times of the files of the store."""
    files = [each for each in (shop.system.state / "store").rglob("*") if each.is_file()]
    return {str(each): (each.stat().st_size, each.stat().st_mtime_ns) for each in files}


@contextlib.contextmanager
def no_signer(shop: Shop) -> Iterator[None]:
    """Freeze the signer: a call of it waits."""
    assert shop.system.signer is not None
    shop.system.signer.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        shop.system.signer.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("kind", ["unpaid", "unknown path", "bad signature", "preflight", "garbage"])
def test_a_request_without_a_payment_needs_no_signer_and_writes_nothing(shop: Shop, kind: str) -> None:
    """With a frozen signer, each kind is answered as ever, and the store's files do not change."""
    customer = Customer(shop)
    customer.get("/v1/x")
    bad = signature_of_another(customer)
    requests = {
        "unpaid": ("GET", "/v1/x", {}, 402, 300),
        "unknown path": ("GET", "/nowhere", {}, 404, 100),
        "bad signature": ("GET", "/v1/x", bad, 402, 4),
        "preflight": ("OPTIONS", "/v1/x", {"Access-Control-Request-Method": "GET", "Origin": "http://a"}, 204, 100),
        "garbage": ("GET", "/v1/x", {"PAYMENT-SIGNATURE": "x"}, 402, 4),
    }
    method, path, headers, status, count = requests[kind]
    calls = len(shop.upstream.calls)
    with httpx.Client(timeout=10) as stranger, no_signer(shop):
        before = written(shop)
        for _ in range(count):
            assert stranger.request(method, shop.url + path, headers=headers).status_code == status
        assert written(shop) == before
    assert len(shop.upstream.calls) == calls
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


FLOODS = {
    "silent": b"",
    "half a head": b"GET /v1/x HTTP/1.1\r\nX: ",
    "unpaid and silent": b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a free body that stops": b"POST /free/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nbegin",
}


@pytest.mark.parametrize("kind", FLOODS)
def test_connections_that_wait_keep_no_payer_out(shop: Shop, kind: str) -> None:
    """With more of them than slots, payers open connections and are served; the REST interface has its own slots."""
    customer = Customer(shop)
    with contextlib.ExitStack() as stack:
        for _ in range(FILES):
            client = stack.enter_context(connect(shop.url))
            with contextlib.suppress(OSError):
                client.sendall(FLOODS[kind])
        for number in range(5):
            headers = customer.headers(f"/v1/{number}", 25)
            with httpx.Client(timeout=10, verify=False) as http:
                answer = http.get(f"{shop.url}/v1/{number}", headers=headers)
            assert (answer.status_code, Bill(answer).charged_sat) == (200, 25)
        assert Customer(shop).record() == (OPENING_SAT, OPENING_SAT)


def peak_mb(shop: Shop) -> int:
    """Most resident memory that the server ever had."""
    assert shop.system.server is not None
    status = Path(f"/proc/{shop.system.server.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1000


@pytest.mark.parametrize("kind", ["up", "up in chunks", "down"])
def test_memory_does_not_depend_on_a_bodys_size(shop: Shop, kind: str) -> None:
    """Large bodies pass in both directions, paid, within a bound that a buffered body would break."""
    customer = Customer(shop)
    before, megabyte = peak_mb(shop), bytes(1_000_000)
    if kind == "down":
        headers = customer.headers(f"/v1/big/{MEGABYTES}", 25)
        with shop.http.stream("GET", f"{shop.url}/v1/big/{MEGABYTES}", headers=headers) as answer:
            assert sum(len(chunk) for chunk in answer.iter_raw()) == MEGABYTES * 1_000_000
    else:
        headers = customer.headers("/v1/upload", 25)
        if kind == "up":
            headers["Content-Length"] = str(MEGABYTES * 1_000_000)
        body = (megabyte for _ in range(MEGABYTES))
        answer = shop.http.post(shop.url + "/v1/upload", headers=headers, content=body)
        assert answer.json() == {"size": MEGABYTES * 1_000_000}
    assert peak_mb(shop) - before < MOST_GROWTH_MB
    assert customer.record() == (OPENING_SAT + 25, OPENING_SAT + 25)


def test_a_slow_reader_fills_no_memory(shop: Shop) -> None:
    """The gateway reads from the upstream as fast as the payer reads from it."""
    customer = Customer(shop)
    payment = customer.headers("/v1/big/100", 25)["PAYMENT-SIGNATURE"].encode()
    before = peak_mb(shop)
    with connect(shop.url) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(b"GET /v1/big/100 HTTP/1.1\r\nHost: x\r\nPAYMENT-SIGNATURE: " + payment + b"\r\n\r\n")
        for _ in range(10):
            assert client.recv(65536)
            time.sleep(0.05)
    assert peak_mb(shop) - before < MOST_GROWTH_MB
