"""Starts and stops the listeners of the merchant interface: a Unix socket, and a port of this machine with a token."""

from __future__ import annotations

import contextlib
import grp
import os
import secrets
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import structlog
from aiohttp import web

from paychan.config import ServerConfig
from paychan.gateway.merchant import AddRoutes, Merchant, merchant_application
from paychan.protocol.settings import SettingsError

log = structlog.get_logger("merchant")

_BACKLOG = 1_024
_PROBE_SECONDS = 1.0
_END_SECONDS = 5.0
"""Time for requests under way at the end."""
_LEAST_TOKEN = 32


class MerchantListeners:
    """The open listeners; see `start_merchant`."""

    def __init__(self, more: Sequence[AddRoutes] = ()) -> None:
        self.more = more
        self.runners: list[web.AppRunner] = []
        self.port = 0
        """The port that the token opens; 0 if there is none."""
        self.path: Path | None = None

    async def close(self) -> None:
        """Close the listeners after their requests."""
        for runner in self.runners:
            await runner.cleanup()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


async def start_merchant(
    config: ServerConfig, source: str, merchant: Merchant, more: Sequence[AddRoutes] = ()
) -> MerchantListeners:
    """Open the listeners that `[merchant]` names; `close` of the result closes them. `source` names the settings file.

    Each of `more` adds routes, under the same guard.

    Raises:
        SettingsError: a listener can't be opened, or the token's file can't be used; nothing is left open.
    """
    found = MerchantListeners(more)
    try:
        await _open_socket(found, config.merchant_socket, config.merchant.socket_group, merchant, source)
        if config.merchant.port:
            token = load_token(config.merchant_token, source)
            await _open_port(found, config.merchant.listen, config.merchant.port, token, merchant, source)
    except BaseException:
        await found.close()
        raise
    return found


async def _runner(found: MerchantListeners, merchant: Merchant, token: str) -> web.AppRunner:
    application = merchant_application(merchant, token, found.more)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=_END_SECONDS)
    await runner.setup()
    found.runners.append(runner)
    return runner


async def _open_socket(found: MerchantListeners, path: Path, group: str, merchant: Merchant, source: str) -> None:
    try:
        listener = _bound(path, group)
    except KeyError:
        raise SettingsError(source, "merchant.socket_group", f"there is no group {group!r}") from None
    except OSError as error:
        raise SettingsError(source, "merchant.socket", f"{path}: {error.strerror or error}") from None
    found.path = path
    await web.SockSite(await _runner(found, merchant, ""), listener, backlog=_BACKLOG).start()


async def _open_port(
    found: MerchantListeners, address: str, port: int, token: str, merchant: Merchant, source: str
) -> None:
    runner = await _runner(found, merchant, token)
    try:
        await web.TCPSite(runner, address, port, backlog=_BACKLOG).start()
    except OSError as error:
        raise SettingsError(
            source, "merchant.port", f"can't listen on {address}:{port}: {error.strerror or error}"
        ) from None
    found.port = port


def _bound(path: Path, group: str) -> socket.socket:
    """Bind a socket; it gets its mode before a process can connect."""
    group_id = grp.getgrnam(group).gr_gid if group else None
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(0o600 if group_id is None else 0o660)
        if group_id is not None:
            os.chown(path, -1, group_id)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a killed server; leave one that answers. Raises `OSError`."""
    if not path.exists():
        return
    if not path.is_socket():
        msg = "it exists and is no socket"
        raise OSError(msg)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        with contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            msg = "another process answers there"
            raise OSError(msg)
    path.unlink()


def load_token(path: Path, source: str) -> str:
    """Read the token, after drawing it if there is no file.

    Raises:
        SettingsError: other users can read the file, it is too short, or it can't be read or written.
    """
    try:
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
        mode, token = stat.S_IMODE(path.stat().st_mode), path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(source, "merchant.token_file", f"{path} can't be read: {error}") from None
    if mode & 0o007:
        raise SettingsError(source, "merchant.token_file", f"{path} has mode {mode:04o}: other users can read it")
    if len(token) < _LEAST_TOKEN:
        raise SettingsError(source, "merchant.token_file", f"{path} holds {len(token)} characters, need {_LEAST_TOKEN}")
    return token
