"""The session with one Electrum server: connects on demand and after a loss, and renews the subscriptions."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from msgspec import Raw, Struct

from paychan.chain.base import ChainFailed, ChainUnfit, WrongNetwork
from paychan.chain.electrum.connection import ElectrumConnection, ServerRefused
from paychan.protocol.types import Network

_PROTOCOL_VERSIONS = ("1.4", "1.6")
"""Oldest and newest version of the Electrum protocol that this client speaks."""

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.25, 15.0
"""Pause between two attempts to connect, doubled after each failure."""

_GENESIS = {
    Network.LIVE: {"000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f"},
    Network.TEST: {
        "000000000933ea01ad0ee984209779baaec3ced90fa3f408719526f8d77f4943",  # testnet3
        "00000000da84f2bafbbc53dee25a72ae507ff4914b867c565be350b0da8bf043",  # testnet4
        "00000008819873e925422c1ff0f99f7cc9bbb232af63a077a480a3633bee1ef6",  # signet
    },
    Network.REGTEST: {"0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206"},
}
"""Displayed hashes of each network's first block."""

_T = TypeVar("_T")


class _Features(Struct):
    genesis_hash: str


class ElectrumLink:
    """One server, `tcp://host:port` or `ssl://host:port`; each request is answered within `timeout_seconds`.

    Over TLS the server's certificate must be exactly the one in `certificate_file` (PEM; most servers sign their own).
    Without such a file, a certificate authority of the system must have signed it. `on_news` is called when a
    subscribed script or the tip may have changed.
    """

    def __init__(
        self,
        url: str,
        network: Network,
        timeout_seconds: float,
        certificate_file: Path | None,
        on_news: Callable[[], None],
    ) -> None:
        """Create the session without connecting.

        Raises:
            ChainUnfit: not the URL of an Electrum server.
        """
        self._url = url
        self._tls, self._host, self._port = _parse_url(url)
        self._network = network
        self._timeout = timeout_seconds
        self._certificate_file = certificate_file
        self._on_news = on_news
        self._connecting = asyncio.Lock()
        self._connection: ElectrumConnection | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._followed: set[str] = set()
        self._subscribed: set[str] = set()
        self._closed = False
        self._delay = 0.0
        self._not_before = 0.0
        self._trouble = ""
        self._protocol = (0, 0)

    async def version(self) -> tuple[int, int]:
        """Return the protocol version negotiated with the server; connects if needed."""
        await self._connected()
        return self._protocol

    async def ask(self, method: str, *params: object, kind: type[_T]) -> _T:
        """Send a request, and decode the answer as `kind`.

        Raises `ServerRefused`, or `ChainFailed` for other failures.
        """
        connection = await self._connected()
        return await connection.ask(method, *params, kind=kind)

    async def follow(self, script_hashes: Iterable[str]) -> None:
        """Subscribe to scripts, on this connection and all later ones."""
        self._followed.update(script_hashes)
        await self._subscribe(await self._connected())

    async def wait_until_connected(self) -> None:
        """Connect, after the pause that follows earlier failures."""
        pause = self._not_before - asyncio.get_running_loop().time()
        if (self._connection is None or self._connection.lost) and pause > 0:
            await asyncio.sleep(pause)
        await self._connected()

    async def close(self) -> None:
        """Close the connection; later calls raise `ChainFailed`."""
        self._closed = True
        async with self._connecting:
            await self._disconnect()

    async def _connected(self) -> ElectrumConnection:
        async with self._connecting:
            if self._connection is not None and not self._connection.lost:
                return self._connection
            if self._closed:
                msg = f"{self._url}: closed"
                raise ChainFailed(msg)
            if (pause := self._not_before - asyncio.get_running_loop().time()) > 0:
                msg = f"{self._trouble}; next attempt in {pause:.1f} s"
                raise ChainFailed(msg)
            await self._disconnect()
            try:
                self._connection = await self._connect()
            except ChainFailed as failure:
                self._delay = min(max(2 * self._delay, _FIRST_DELAY_SECONDS), _LONGEST_DELAY_SECONDS)
                self._not_before = asyncio.get_running_loop().time() + self._delay
                self._trouble = str(failure)
                raise
            self._delay = 0.0
            self._subscribed.clear()
            self._renewing = asyncio.create_task(self._renew(self._connection))
            return self._connection

    async def _connect(self) -> ElectrumConnection:
        connection = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await ElectrumConnection.open(
                    self._url, self._host, self._port, self._tls_context(), self._timeout, self._on_news
                )
                self._check_certificate(connection)
                await self._handshake(connection)
        except BaseException as error:
            if connection is not None:
                await connection.close()
            if isinstance(error, OSError):
                raise self._unreachable(error) from None
            raise
        return connection

    async def _handshake(self, connection: ElectrumConnection) -> None:
        """Negotiate the protocol version, check the network, and subscribe to new blocks."""
        try:
            _, version = await connection.ask("server.version", "paychan", _PROTOCOL_VERSIONS, kind=tuple[str, str])
        except ServerRefused as error:
            msg = f"{self._url}: no common version of the Electrum protocol, this client speaks 1.4 to 1.6: {error}"
            raise ChainUnfit(msg) from None
        self._protocol = _parse_version(version)
        features = await connection.ask("server.features", kind=_Features)
        if features.genesis_hash not in _GENESIS[self._network]:
            msg = (
                f"{self._url}: the server follows the network that begins with block {features.genesis_hash}, "
                f"the configuration says {self._network.value!r}: give the URL of a server of that network"
            )
            raise WrongNetwork(msg)
        await connection.ask("blockchain.headers.subscribe", kind=Raw)

    async def _renew(self, connection: ElectrumConnection) -> None:
        """Subscribe again on a new connection, and report a change: some may have been missed without the connection."""
        with suppress(ChainFailed):
            await self._subscribe(connection)
        self._on_news()

    async def _subscribe(self, connection: ElectrumConnection) -> None:
        missing = self._followed - self._subscribed
        self._subscribed |= missing  # before the requests, which a concurrent caller need not repeat
        await asyncio.gather(*(self._subscribe_script(connection, script_hash) for script_hash in missing))

    async def _subscribe_script(self, connection: ElectrumConnection, script_hash: str) -> None:
        # The server may refuse a script whose history is too long. Callers read it at every time-out; the others must
        # still work.
        with suppress(ServerRefused):
            await connection.ask("blockchain.scripthash.subscribe", script_hash, kind=Raw)

    async def _disconnect(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        if self._connection is not None:
            await self._connection.close()

    def _tls_context(self) -> ssl.SSLContext | None:
        if not self._tls:
            return None
        if self._certificate_file is None:
            return ssl.create_default_context()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # `_check_certificate` is stricter: this certificate and no other
        return context

    def _check_certificate(self, connection: ElectrumConnection) -> None:
        if not self._tls or self._certificate_file is None:
            return
        try:
            expected = ssl.PEM_cert_to_DER_cert(self._certificate_file.read_text())
        except (OSError, ValueError) as error:
            msg = f"{self._certificate_file}: no certificate in PEM form: {error}"
            raise ChainUnfit(msg) from None
        if connection.certificate != expected:
            msg = (
                f"{self._url}: the server's certificate is not the one in {self._certificate_file}: "
                f"if its operator has renewed it, get the new one from that operator"
            )
            raise ChainUnfit(msg)

    def _unreachable(self, error: OSError) -> ChainFailed:
        if isinstance(error, ssl.SSLCertVerificationError):
            return ChainUnfit(
                f"{self._url}: no certificate authority signed the server's certificate ({error.verify_message}): "
                f"save the certificate as a file and set it as the certificate file"
            )
        if isinstance(error, TimeoutError):
            return ChainFailed(f"{self._url}: no answer within {self._timeout} s")
        reason = "no server listens there" if isinstance(error, ConnectionRefusedError) else error.strerror or error
        return ChainFailed(f"{self._url}: {reason}")


def _parse_url(url: str) -> tuple[bool, str, int]:
    """Return whether the URL is TLS, its host and its port."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        port = None
    if port is None or parts.scheme not in ("tcp", "ssl") or not parts.hostname or parts.path or parts.query:
        msg = f"{url}: not the URL of an Electrum server: expected tcp://host:port or ssl://host:port"
        raise ChainUnfit(msg)
    return parts.scheme == "ssl", parts.hostname, port


def _parse_version(text: str) -> tuple[int, int]:
    """Return the major and the minor number."""
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    if not (major.isdecimal() and minor.isdecimal()):
        msg = f"version {text!r} of the Electrum protocol"
        raise ChainFailed(msg)
    return int(major), int(minor)
