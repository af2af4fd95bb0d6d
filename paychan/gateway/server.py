"""Makes a gateway of its parts: listener, proxy, cashier, price list; starts and stops it with the server."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from time import time

import aiohttp
import structlog
from aiohttp import web
from msgspec.structs import replace
from tornado.httputil import HTTPHeaders
from tornado.netutil import bind_sockets

from actors.context import wall_clock
from paychan.api import forwarded
from paychan.api.budgets.connection_slots import ConnectionSlots
from paychan.api.limits import BACKLOG
from paychan.api.rate_limited_log import RateLimitedLog
from paychan.api.service import Service
from paychan.gateway.allowance import Allowance
from paychan.gateway.answers import StoredAnswers
from paychan.gateway.cashier import Cashier
from paychan.gateway.charging import Charges
from paychan.gateway.discovery import Catalogues
from paychan.gateway.front import Front
from paychan.gateway.offering import Offering
from paychan.gateway.prices import PriceList
from paychan.gateway.proxy import Proxy
from paychan.gateway.sale import Shop
from paychan.protocol.errors import PaychanError
from paychan.protocol.types import Network, Sat
from paychan.protocol.wire.offers import CHAINS, Offer
from paychan.supervisor import Supervised

log = structlog.get_logger("gateway")

_WORDS = {Network.LIVE: "mainnet", Network.REGTEST: "regtest", Network.TEST: "testnet"}
_SECRET_BYTES = 32
_STOP_SECONDS = 10.0
_MOST_UPSTREAM = 1000
"""Connections to upstreams."""


class Gateway:
    """The gateway of one server."""

    def __init__(self, service: Service, prices: PriceList, pay_url: str) -> None:
        """Make all parts but the listener. `pay_url` is where clients open channels, without a slash at the end."""
        config = service.config
        self._service, self._prices = service, prices
        self._secrets = _secrets(config.state_dir / "gateway.secrets")
        self._session: aiohttp.ClientSession | None = None
        self._identity: Supervised | None = None
        self._sweeper: Supervised | None = None
        self._terms = _terms(service, pay_url)
        self.cashier = Cashier(Charges(service.registry), self._secrets, wall_clock)
        self.slots = ConnectionSlots(service.descriptors.gateway, "gateway", service.memory.new_work)
        self.front: Front | None = None
        self.offering = Offering(self._terms, lambda: self._secrets)

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
            offering=self.offering,
            cashier=self.cashier,
            catalogues=Catalogues(self._prices, self._terms, time()),
            answers=StoredAnswers(self._prices.answers),
            allowance=Allowance(self._prices.allowance),
            upstream=self._session,
            client_of=_client_reader(trusts=http.trust_forwarded),
            clock=time,
            failing=RateLimitedLog("an upstream gives no answer"),
        )
        proxy = Proxy(shop)
        self.front = Front(
            proxy.handle,
            proxy.quick,
            self.slots,
            idle_seconds=http.idle_seconds,
            head_seconds=http.head_seconds,
            max_header_bytes=http.max_header_bytes,
        )
        self._sweeper = service.supervisor.run("gateway connections", self.front.sweep)
        self._identity = service.supervisor.run("gateway identity", self._learn_identity, endless=False)
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
        for task in (self._sweeper, self._identity):
            if task is not None:
                await task.stop()
        if self._session is not None:
            await self._session.close()

    async def _learn_identity(self, task: Supervised) -> None:
        """Ask the signer for the identity key; until it is known, nothing is offered."""
        while not self._terms.identity:
            try:
                identity = (await self._service.context.signer.health()).identity_key
            except PaychanError as error:
                log.warning("gateway waits for the signer", reason=str(error))
                await asyncio.sleep(1)
                continue
            self._terms = replace(self._terms, identity=identity)
            self.offering.terms = self._terms
            task.succeeded()


def _terms(service: Service, pay_url: str) -> Offer:
    """Return what every offer has in common; the identity key is not known yet."""
    config, rules = service.config, service.context.rules
    network = _WORDS[config.bitcoin_network]
    return Offer(
        amount_sat=Sat(0),
        unit="request",
        chain=CHAINS[network],
        identity=b"",
        pay_url=pay_url,
        network=network,
        open_price_sat=config.opening_terms.v2_price_sat,
        min_confirmations=rules.min_confirmations,
        settlement_period_seconds=rules.settlement_period_seconds,
        dust_sat=rules.dust_sat,
        realm="",
    )


def _secrets(path: Path) -> tuple[bytes, ...]:
    """Read the keys of challenges, one in a line as hex, the newest first; draw one if there is no file.

    To change the key, write a new line above the old one, and remove the old one some minutes later.
    """
    try:
        return tuple(bytes.fromhex(line) for line in path.read_text().split())
    except FileNotFoundError:
        drawn = secrets.token_bytes(_SECRET_BYTES)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(drawn.hex() + "\n")
    except OSError as error:  # challenges of this process hold until it ends
        log.warning("challenges end with this process", file=str(path), reason=error.strerror)
    return (drawn,)


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
