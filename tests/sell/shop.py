"""A real server with its merchant interface, programs of real frameworks on threads, and a wallet that pays."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any

import httpx

from paychan.client import Budget, Payer, Purse
from paychan.client.paying.demands import read_outcome
from paychan.client.paying.httpx import PaidTransport
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.offers import Settled, Voucher
from paychan.protocol.wire.x402_json import read_required
from tests.lib.rbpcp import V2
from tests.lib.rbpcp import Payer as RbpcpPayer
from tests.lib.system import System

OPENING_SAT = 100_000


class Shop:
    """A server, a seller's socket, and a payer's wallet with one channel."""

    def __init__(self, system: System, wallet: Path) -> None:
        self.system, self.wallet = system, wallet
        payer = Payer(system.url, wallet=wallet, version=2)
        channel = payer.new_channel(hours=100)
        self.outpoint = debug_outpoint(channel.record.terms.client_key, channel.record.expiry)
        channel.fund(str(self.outpoint), DEBUG_FUNDING_SAT)
        channel.open()
        payer.close()
        self.purse = Purse(Budget(per_request=1_000), wallet)

    @property
    def socket(self) -> str:
        return str(self.system.state / "merchant.sock")

    @contextmanager
    def payer(self, url: str) -> Iterator[httpx.Client]:
        """Return a client that pays."""
        with httpx.Client(transport=PaidTransport(self.purse), base_url=url, timeout=30) as client:
            yield client


class Customer:
    """A payer with one open channel that answers offers as the wire pages say; `paid_sat` is beyond its opening."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.payer, self.paid_sat = shop, RbpcpPayer(), 0
        with httpx.Client(timeout=30, verify=False) as http:
            assert V2(shop.system.url, self.payer, http).open(self.payer.payment(OPENING_SAT)).status_code == 201

    def headers(self, offered: httpx.Response, more_sat: int = 25, way: str = "x402") -> dict[str, str]:
        """Answer the offer of a 402 with the payment that gives `more_sat` more than the last one."""
        assert offered.status_code == 402, (offered.status_code, offered.text)
        return self._answering(dict(offered.headers), more_sat, way)

    def _answering(self, headers: dict[str, str], more_sat: int, way: str) -> dict[str, str]:
        found = {name.lower(): value for name, value in headers.items()}
        self.paid_sat += more_sat
        payment = self.payer.payment(OPENING_SAT + self.paid_sat)
        voucher = Voucher.of(self.payer.outpoint, self.payer.funding_sat, payment)
        if way == "x402":
            first = x402.offers(read_required(found["payment-required"]))[0]
            return {"PAYMENT-SIGNATURE": x402.payment_header(first, voucher)}
        challenge = mpp.offers([found["www-authenticate"]])[0].challenge
        return {"Authorization": mpp.credential_header(challenge, voucher)}

    def get(self, url: str, more_sat: int = 25, way: str = "x402", **more: Any) -> httpx.Response:
        """Pay for a URL and get it."""
        extra = more.pop("headers", {})
        payment = self.headers(raw(url, headers=extra, **more), more_sat, way)
        return raw(url, headers={**extra, **payment}, **more)

    def sums(self) -> tuple[int, int]:
        """Return what the server has accepted and spent since the opening, by a price that is too high."""
        ask = {"method": "GET", "url": "http://sums.example/", "price_sat": 10**15, "body_sha256": "0" * 64}
        transport = httpx.HTTPTransport(uds=self.shop.socket)
        with httpx.Client(transport=transport, base_url="http://merchant") as http:
            offered = http.post("/offer", json=ask).json()
            headers = self._answering(dict(offered["headers"]), 0, "x402")
            refused = http.post("/charge", json={**ask, "headers": list(headers.items())}).json()
        required = dict(refused["headers"])["PAYMENT-REQUIRED"]
        state = x402.offers(read_required(required))[0].state
        assert state is not None, refused
        return state.accepted_sat - OPENING_SAT, state.spent_sat - OPENING_SAT


def settled(answer: httpx.Response) -> Settled:
    """Return what an answer says about its payment."""
    found = read_outcome(tuple((name.lower(), value) for name, value in answer.headers.multi_items()))
    assert found is not None, (answer.status_code, answer.headers, answer.text)
    return found[0]


@contextmanager
def serve_asgi(app: Any) -> Iterator[str]:
    """Serve a program by uvicorn; return its URL."""
    import uvicorn
    from tornado.netutil import bind_sockets

    (socket,) = bind_sockets(0, "127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="auto"))
    with _thread(lambda: asyncio.run(server.serve(sockets=[socket]))):
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
    socket.close()


class _Threading(ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Write no line for a request."""


@contextmanager
def serve_wsgi(app: Any) -> Iterator[str]:
    """Serve a program by the standard library's server; return its URL."""
    with (
        wsgiref.simple_server.make_server("127.0.0.1", 0, app, _Threading, _Quiet) as server,
        _thread(lambda: server.serve_forever(poll_interval=0.01)),
    ):
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def serve_tornado(app: Any, wall: Any) -> Iterator[str]:
    """Serve a program by Tornado, and close its `Paywall` at the end; return its URL."""
    from tornado.httpserver import HTTPServer
    from tornado.netutil import bind_sockets

    sockets = bind_sockets(0, "127.0.0.1")
    ready, ending = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        server = HTTPServer(app)
        server.add_sockets(sockets)
        loops.append(asyncio.get_running_loop())
        ready.set()
        await ending.wait()
        server.stop()
        await server.close_all_connections()
        await wall.close()

    with _thread(lambda: asyncio.run(run())):
        ready.wait(30)
        try:
            yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        finally:
            loops[0].call_soon_threadsafe(ending.set)


@contextmanager
def _thread(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(30)
        with contextlib.suppress(RuntimeError):
            assert not thread.is_alive()


def raw(url: str, **more: Any) -> httpx.Response:
    """Send one request without paying for it."""
    with httpx.Client(timeout=30, trust_env=False, verify=False) as client:  # certificates take long to load
        return client.request(more.pop("method", "GET"), url, **more)
