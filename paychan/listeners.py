"""Opens and closes the listeners of a server: for clients, for the operator, and for the gateway's payers."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from paychan.api.limits import BoundedServer
from paychan.api.server import listen, management_server, public_server
from paychan.api.service import Service
from paychan.api.stream.handler import close_all
from paychan.gateway.loading import load_prices
from paychan.parts import StartError
from paychan.running import Running, remove_running, write_running
from paychan.shared.holders import cannot_listen

if TYPE_CHECKING:
    from paychan.gateway.counter import Counter
    from paychan.gateway.merchant_listener import MerchantListeners
    from paychan.gateway.prices import PriceList
    from paychan.gateway.server import Gateway

log = structlog.get_logger("server")

ANSWER_SECONDS = 10.0
"""Longer than the default deadlines of signer and application, shorter than a service manager's stop timeout."""


@contextlib.asynccontextmanager
async def listening(service: Service, source: str) -> AsyncIterator[Running]:
    """Open the ports. At the end, refuse new connections first, then let running requests finish.

    Raises:
        StartError, SettingsError: a port is in use, or the price list is wrong.
    """
    config = service.config
    selling = _Selling(service, source)
    public = public_server(service)
    token = _new_token(config.management_token)
    management = management_server(service, token)
    try:
        port = await _listen(public, config.http.listen, config.port, "http.port (or PORT)")
        where = config.management
        management_port = await _listen(management, where.listen, where.port, "management.port")
        url = _local_url(config.http.listen, port)
        gateway_url = await selling.open(config.http.public_url.rstrip("/") or url)
        running = Running(os.getpid(), url, _local_url(where.listen, management_port), gateway_url)
        try:
            write_running(config.state_dir, running)
        except OSError as error:
            log.error("commands can't find this server", reason=error.strerror)  # noqa: TRY400
        yield running
    finally:
        remove_running(config.state_dir)
        selling.stop_listening()
        for server in (public, management):
            server.stop()
            server.conn_params.no_keep_alive = True  # a connection closes after its current or its next request
        service.streams.stop()
        await selling.close()
        await service.registry.all_answered(ANSWER_SECONDS)
        await close_all(service)
        for server in (public, management):
            await server.close_all_connections()
        await service.drop_requests()
        config.management_token.unlink(missing_ok=True)


class _Selling:
    """The doors for payers of other services: the gateway, and the merchant interface."""

    def __init__(self, service: Service, source: str) -> None:
        """Read the price list. Raises `SettingsError`."""
        self._service, self._source = service, source
        settings = service.config.gateway
        self._prices = load_prices(settings, source) if settings.is_on else None
        self._counter: Counter | None = None
        self._gateway: Gateway | None = None
        self._merchant: MerchantListeners | None = None

    async def open(self, pay_url: str) -> str:
        """Open what the settings name; return the gateway's URL, "" without one."""
        if self._prices is None and not self._service.config.merchant.on:
            return ""
        from paychan.gateway.counter import Counter  # noqa: PLC0415 - a server that sells nothing starts faster

        self._counter = Counter(self._service, pay_url)
        await self._counter.start()
        if self._service.config.merchant.on:
            await self._open_merchant(self._counter)
        return "" if self._prices is None else await self._open_gateway(self._prices, self._counter)

    async def _open_merchant(self, counter: Counter) -> None:
        from paychan.gateway.facilitator import Facilitator, add_routes  # noqa: PLC0415 - see `open`
        from paychan.gateway.merchant import Merchant  # noqa: PLC0415
        from paychan.gateway.merchant_listener import start_merchant  # noqa: PLC0415
        from paychan.gateway.underway import UnderWay  # noqa: PLC0415

        settings = self._service.config.merchant
        merchant = Merchant(counter.cashier, counter.offering, UnderWay(settings.lease_seconds, settings.repeats))
        facilitator = Facilitator(
            counter.cashier,
            counter.offering,
            self._service.context.view,
            lease_seconds=settings.lease_seconds,
            repeats=settings.repeats,
        )
        more = (partial(add_routes, facilitator=facilitator),)
        self._merchant = await start_merchant(self._service.config, self._source, merchant, more)

    async def _open_gateway(self, prices: PriceList, counter: Counter) -> str:
        from paychan.gateway.server import Gateway  # noqa: PLC0415 - see `open`

        where = self._service.config.gateway
        self._gateway = Gateway(self._service, prices, counter)
        try:
            port = await self._gateway.start(where.listen, where.port)
        except OSError as error:
            raise StartError(cannot_listen(error, where.listen, where.port, "gateway.port")) from error
        return _local_url(where.listen, port)

    def stop_listening(self) -> None:
        """Accept no more connections of payers; requests go on."""
        if self._gateway is not None:
            self._gateway.stop_listening()

    async def close(self) -> None:
        """Let requests end: those of payers, then those of sellers' programs."""
        for part in (self._gateway, self._merchant, self._counter):
            if part is not None:
                await part.close()


async def _listen(server: BoundedServer, address: str, port: int, key: str) -> int:
    try:
        return await listen(server, address, port)
    except OSError as error:
        raise StartError(cannot_listen(error, address, port, key)) from error


def _local_url(address: str, port: int) -> str:
    """Return the URL under which this machine reaches a listener."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _new_token(path: Path) -> str:
    """Write a fresh management token that only the server's user can read."""
    token = secrets.token_hex(32)
    path.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
    except OSError as error:  # a full disk: the server runs on, but commands that change something have no token
        log.error("no management token", file=str(path), reason=error.strerror)  # noqa: TRY400
    return token
