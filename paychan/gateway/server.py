"""Makes a gateway of its parts: listener, proxy, cashier, price list; starts and stops it with the server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import time

import aiohttp
import structlog
from aiohttp import web
from tornado.httputil import HTTPHeaders
from tornado.netutil import bind_sockets

from actors.context import wall_clock
from paychan.api import forwarded
from paychan.api.budgets.connection_slots import ConnectionSlots
from paychan.api.budgets.penalty import Penalty
from paychan.api.limits import BACKLOG
from paychan.api.rate_limited_log import RateLimitedLog
from paychan.api.service import Service
from paychan.gateway.allowance import Allowance
from paychan.gateway.answers import StoredAnswers
from paychan.gateway.counter import Counter
from paychan.gateway.discovery import Catalogues
from paychan.gateway.front import Front
from paychan.gateway.prices import PriceList
from paychan.gateway.proxy import Proxy
from paychan.gateway.receipt_key import ReceiptKey
from paychan.gateway.sale import Shop
from paychan.gateway.underway import UnderWay
from paychan.protocol.types import Network
from paychan.supervisor import Supervised

log = structlog.get_logger("gateway")

_WORDS = {Network.LIVE: "mainnet", Network.REGTEST: "regtest", Network.TEST: "testnet"}
_SECRET_BYTES = 32
_STOP_SECONDS = 10.0
_LEASE_SECONDS = 86_400.0
"""Longest time before an answer begins; the route's time-outs end it earlier."""
_MOST_UPSTREAM = 1000
"""Connections to upstreams."""


class Gateway:
    """The gateway of one server."""

    def __init__(self, service: Service, prices: PriceList, counter: Counter) -> None:
        """Make all parts but the listener."""
        self._service, self._prices, self._counter = service, prices, counter
        self._session: aiohttp.ClientSession | None = None
        self._sweeper: Supervised | None = None
        self._certifying: Supervised | None = None
        self._receipts = ReceiptKey(service.context.signer, wall_clock)
        self.slots = ConnectionSlots(service.descriptors.gateway, "gateway", service.memory.new_work)
        self.front: Front | None = None

    async def start(self, address: str, port: int) -> int:
        """Listen; return the port. Raises `OSError`: the port is in use."""
        sockets = bind_sockets(port, address, backlog=BACKLOG)
        service, http = self._service, self._service.config.http
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_MOST_UPSTREAM, ttl_dns_cache=30),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(total=None),
            max_line_size=http.max_header_bytes * 4,
            max_field_size=http.max_header_bytes * 4,
        )
        shop = Shop(
            prices=self._prices,
            offering=self._counter.offering,
            cashier=self._counter.cashier,
            catalogues=Catalogues(self._prices, self._counter.offering.terms, time()),
            answers=StoredAnswers(self._prices.answers),
            allowance=Allowance(self._prices.allowance),
            upstream=self._session,
            client_of=_client_reader(trusts=http.trust_forwarded),
            clock=time,
            failing=RateLimitedLog("an upstream gives no answer"),
            receipts=self._receipts,
            under_way=UnderWay(_LEASE_SECONDS, service.config.merchant.repeats),
        )
        proxy = Proxy(shop)
        self.front = Front(
            proxy.handle,
            proxy.quick,
            self.slots,
            penalty=partial(Penalty, http.max_bad_signatures, closes=not http.trust_forwarded),
            idle_seconds=http.idle_seconds,
            head_seconds=http.head_seconds,
            max_header_bytes=http.max_header_bytes,
        )
        self._sweeper = service.supervisor.run("gateway connections", self.front.sweep)
        self._certifying = service.supervisor.run("receipt key", self._receipts.run)
        self.front.listen_on(sockets)
        return int(sockets[0].getsockname()[1])

    def stop_listening(self) -> None:
        """Accept no more connections; requests go on."""
        if self.front is not None:
            self.front.stop()

    async def close(self) -> None:
        """Let running requests end, then close all connections."""
        if self.front is not None:
            self.front.pre_shutdown()
            await self.front.shutdown(_STOP_SECONDS)
        for task in (self._sweeper, self._certifying):
            if task is not None:
                await task.stop()
        if self._session is not None:
            await self._session.close()


def _client_reader(*, trusts: bool) -> Callable[[web.BaseRequest], tuple[str, str, str]]:
    def plainly(request: web.BaseRequest) -> tuple[str, str, str]:
        return request.remote or "", "http", request.headers.get("Host", "")

    def by_proxy(request: web.BaseRequest) -> tuple[str, str, str]:
        headers = HTTPHeaders()
        for name, value in request.headers.items():
            headers.add(name, value)
        address, scheme, host = plainly(request)
        return (
            forwarded.address(headers, address),
            forwarded.protocol(headers) or scheme,
            forwarded.host(headers) or host,
        )

    return by_proxy if trusts else plainly
