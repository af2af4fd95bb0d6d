"""Opens and closes the listeners of a server: for clients, for the operator, and for the gateway's payers."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncIterator
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
    prices = load_prices(config.gateway, source) if config.gateway.is_on else None
    gateway: Gateway | None = None
    public = public_server(service)
    token = _new_token(config.management_token)
    management = management_server(service, token)
    try:
        port = await _listen(public, config.http.listen, config.port, "http.port (or PORT)")
        where = config.management
        management_port = await _listen(management, where.listen, where.port, "management.port")
        url, gateway_url = _local_url(config.http.listen, port), ""
        if prices is not None:
            gateway, gateway_url = await _open_gateway(service, prices, config.http.public_url.rstrip("/") or url)
        running = Running(os.getpid(), url, _local_url(where.listen, management_port), gateway_url)
        try:
            write_running(config.state_dir, running)
        except OSError as error:
            log.error("commands can't find this server", reason=error.strerror)  # noqa: TRY400
        yield running
    finally:
        remove_running(config.state_dir)
        if gateway is not None:
            gateway.stop_listening()
        for server in (public, management):
            server.stop()
            server.conn_params.no_keep_alive = True  # a connection closes after its current or its next request
        service.streams.stop()
        if gateway is not None:
            await gateway.close()
        await service.registry.all_answered(ANSWER_SECONDS)
        await close_all(service)
        for server in (public, management):
            await server.close_all_connections()
        await service.drop_requests()
        config.management_token.unlink(missing_ok=True)


async def _open_gateway(service: Service, prices: PriceList, pay_url: str) -> tuple[Gateway, str]:
    from paychan.gateway.server import Gateway  # noqa: PLC0415 - a server without a gateway starts faster

    where = service.config.gateway
    gateway = Gateway(service, prices, pay_url)
    try:
        port = await gateway.start(where.listen, where.port)
    except OSError as error:
        raise StartError(cannot_listen(error, where.listen, where.port, "gateway.port")) from error
    return gateway, _local_url(where.listen, port)


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
