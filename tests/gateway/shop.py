"""A seller's service behind the real server's gateway, and a payer that answers offers as the wire pages say."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from aiohttp import WSMsgType, web

from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.mpp_outcomes import read_receipt
from paychan.protocol.wire.offers import ChannelState, Close, Settled, Voucher
from paychan.protocol.wire.x402_json import read_required, read_response
from paychan.protocol.wire.x402_outcomes import read_settled
from tests.lib.rbpcp import V2, Payer
from tests.lib.system import System

OPENING_SAT = 100_000
PRICE_SAT = 25

PRICES = """
upstream = "{upstream}"
realm = "shop.example"
free = ["/free/**"]
[timeouts]
connect_seconds = 2
first_byte_seconds = 2
idle_seconds = 2
[[route]]
path = "/v1/**"
price_sat = 25
[[route]]
path = "/told/**"
ceiling_sat = 40
[[route]]
path = "/events/**"
unit = "event"
price_sat = 5
pause_seconds = 1.5
[[route]]
path = "/kilobytes/**"
unit = "kilobyte"
price_sat = 3
pause_seconds = 1.5
[[route]]
path = "/bytes/**"
unit = "byte"
price_sat = 1
pause_seconds = 1.5
[[route]]
path = "/seconds/**"
unit = "second"
price_sat = 2
pause_seconds = 1.5
"""


class Upstream:
    """The seller's service, on a thread of its own. `calls` are the requests that reached it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, dict[str, list[str]], bytes]] = []
        self.fails: set[str] = set()
        """Targets that are answered with 500."""
        self.gate = threading.Event()
        self.gate.set()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.gate.set()
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._ending = asyncio.Event()
        self._ready.set()
        await self._ending.wait()
        await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        kind, _, argument = request.path.partition("/")[2].partition("/")[2].partition("/")
        body = b"" if kind == "upload" else await request.read()
        headers = {name: request.headers.getall(name) for name in request.headers}
        self.calls.append((request.method, request.raw_path, headers, body))
        while not self.gate.is_set():  # noqa: ASYNC110 - another thread opens it
            await asyncio.sleep(0.01)
        if request.raw_path in self.fails:
            return web.Response(status=500)
        work = getattr(self, f"_{kind}", None)
        if work is not None:
            return await work(request, argument)
        answer = {"path": request.raw_path, "method": request.method, "body": body.decode("latin1")}
        return web.json_response(answer, headers={"X-Shop": "yes", "Payment-Receipt": "forged"})

    async def _upload(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
        return web.json_response({"size": size})

    async def _status(self, _request: web.BaseRequest, argument: str) -> web.StreamResponse:
        return web.Response(status=int(argument), text="as asked")

    async def _hang(self, _request: web.BaseRequest, _: str) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async def _drop(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        """End the connection before the head, or in the middle of the body."""
        response = web.StreamResponse(headers={"Content-Length": "100000"})
        if argument == "body":
            await response.prepare(request)
            await response.write(b"a part of it")
            await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.close()
        return response

    async def _garbage(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"this is no HTTP\r\n\r\n")
        request.transport.close()
        return web.Response()

    async def _price(self, _request: web.BaseRequest, argument: str) -> web.StreamResponse:
        return web.Response(text="work", headers={"X-Paychan-Price": argument})

    async def _big(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(int(argument)):
                await response.write(bytes(1_000_000))
        return response

    async def _sse(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for number in range(int(argument)):
                await response.write(b"data: %d\n\n" % number)
        return response

    async def _drip(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        """Send a number of bytes, one each half second."""
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(int(argument)):
                await response.write(b"x")
                await asyncio.sleep(0.5)
        return response

    async def _lines(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for number in range(int(argument)):
                await response.write(b"%d\n" % number)
        return response

    async def _ws(self, request: web.BaseRequest, argument: str) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=["chat"])
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                for number in range(int(argument or 1)):
                    await socket.send_str(f"{number} {message.data}")
        return socket


class Bill:
    """The gateway's word about a paid request."""

    def __init__(self, response: httpx.Response) -> None:
        self.settled: Settled
        if "PAYMENT-RESPONSE" in response.headers:
            self.settled = read_settled(read_response(response.headers["PAYMENT-RESPONSE"]))
        else:
            self.settled = read_receipt(response.headers["Payment-Receipt"]).settled

    @property
    def charged_sat(self) -> int:
        return self.settled.charged_sat

    @property
    def state(self) -> ChannelState:
        return self.settled.state


class Customer:
    """A payer with one open channel; `paid_sat` is the sum of its newest payment."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.payer = shop, Payer()
        self.paid_sat = OPENING_SAT
        v2 = V2(shop.system.url, self.payer, shop.http)
        opened = v2.open(self.payer.payment(OPENING_SAT))
        assert opened.status_code == 201, opened.text

    def voucher(self, paid_sat: int | None = None) -> Voucher:
        paid_sat = self.paid_sat if paid_sat is None else paid_sat
        return Voucher.of(self.payer.outpoint, self.payer.funding_sat, self.payer.payment(paid_sat))

    def headers(
        self, path: str, more_sat: int = 0, *, way: str = "x402", close: bool = False, name: str = ""
    ) -> dict[str, str]:
        """Answer the offer of a path with the payment that gives `more_sat` more than the last one."""
        offered = self.shop.get(path)
        assert offered.status_code == 402, (offered.status_code, offered.text)
        self.paid_sat += more_sat
        voucher = self.voucher()
        action = Close(voucher) if close else voucher
        if way == "x402":
            found = x402.offers(read_required(offered.headers["PAYMENT-REQUIRED"]))[0]
            return {"PAYMENT-SIGNATURE": x402.payment_header(found, action, identifier=name)}
        challenge = mpp.offers(offered.headers.get_list("WWW-Authenticate"))[0].challenge
        return {"Authorization": mpp.credential_header(challenge, action)}

    def get(self, path: str, more_sat: int = PRICE_SAT, way: str = "x402", **headers: str) -> httpx.Response:
        """Pay for a path and get it."""
        return self.shop.get(path, headers={**self.headers(path, more_sat, way=way), **headers})

    def record(self) -> tuple[int, int]:
        """Sums that the server has on disk or in memory: accepted and spent; by a voucher of no value."""
        answer = self.shop.http.head(self.shop.url + "/events/sse/0", headers=self.headers("/events/sse/0"))
        assert answer.status_code == 204, answer.status_code
        state = Bill(answer).state
        return state.accepted_sat, state.spent_sat


class Shop:
    """Upstream and server."""

    def __init__(self, system: System, upstream: Upstream, http: httpx.Client) -> None:
        self.system, self.upstream, self.http = system, upstream, http

    @property
    def url(self) -> str:
        assert self.system.running is not None
        return self.system.running.gateway_url

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.http.get(self.url + path, **more)

    def seen(self) -> dict[str, list[str]]:
        """Headers of the last request that reached the upstream."""
        return {name.lower(): values for name, values in self.upstream.calls[-1][2].items()}


@contextmanager
def open_shop(
    directory: Path,
    prices: str = PRICES,
    sections: dict[str, str] | None = None,
    limits: dict[int, int] | None = None,
) -> Iterator[Shop]:
    upstream = Upstream()
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "prices.toml"
    file.write_text(prices.format(upstream=upstream.url))
    settings = {"gateway": f'port = 0\nprices = "{file}"', **(sections or {})}
    try:
        with System(directory, sections=settings, limits=limits) as system, httpx.Client(timeout=30) as http:
            yield Shop(system, upstream, http)
    finally:
        upstream.stop()
