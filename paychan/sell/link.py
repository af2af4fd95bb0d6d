"""Connections to the server's merchant interface, by its socket or by its port with the token; pooled and kept open."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import httpx
import msgspec

from paychan.protocol.wire import merchant as wire
from paychan.sell.exchange import Send, ServerAway, Steps

MERCHANT_VARIABLE, TOKEN_VARIABLE = "PAYCHAN_MERCHANT", "PAYCHAN_MERCHANT_TOKEN_FILE"
_TIMEOUT = httpx.Timeout(15.0, connect=2.0)
_LIMITS = httpx.Limits(max_connections=200, max_keepalive_connections=50, keepalive_expiry=30)


class Place:
    """Place of the merchant interface.

    Args:
        merchant: path of the socket, or `http://host:port`; default: the environment variable PAYCHAN_MERCHANT.
        token_file: file with the token, for a port; default: PAYCHAN_MERCHANT_TOKEN_FILE.

    Raises:
        ValueError: neither argument nor variable names a place, or a port comes without a token.
    """

    def __init__(
        self, merchant: str | os.PathLike[str] | None = None, token_file: str | os.PathLike[str] | None = None
    ) -> None:
        where = os.fspath(merchant or os.environ.get(MERCHANT_VARIABLE, ""))
        if not where:
            msg = f"no merchant interface: name the server's merchant.sock by `merchant` or {MERCHANT_VARIABLE}"
            raise ValueError(msg)
        self.headers: dict[str, str] = {}
        self.socket: str | None = None
        self.url = "http://merchant"
        if not where.startswith(("http://", "https://")):
            self.socket = os.path.abspath(where)  # noqa: PTH100 - links stay: a socket's path has at most 107 bytes
            return
        token = token_file or os.environ.get(TOKEN_VARIABLE)
        if not token:
            msg = f"{where} needs the server's merchant.token: name it by `token_file` or {TOKEN_VARIABLE}"
            raise ValueError(msg)
        self.url = where.rstrip("/")
        self.headers["Authorization"] = f"Bearer {Path(token).read_text(encoding='ascii').strip()}"


class Link:
    """Sends messages from any thread."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._client: httpx.Client | None = None
        self._making = threading.Lock()
        self._process = 0

    def send(self, step: Send) -> wire.Reply | None:
        """Send a message; once more after a broken connection. Raises `ServerAway`."""
        client = self._own_client()
        for is_last in (False, True):
            try:
                answer = client.post(step.path, content=msgspec.json.encode(step.message))
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                if is_last or not _may_repeat(step):
                    raise _away(error) from error
            except httpx.TransportError as error:
                raise _away(error) from error
            else:
                return _reply(answer)
        return None

    def drive(self, steps: Steps) -> object:
        """Perform the steps, and return their result."""
        try:
            step = next(steps)
            while True:
                try:
                    reply = self.send(step)
                except ServerAway as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            return end.value

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _own_client(self) -> httpx.Client:
        """Return the client of this process: a server may fork after the program was loaded."""
        with self._making:
            if self._client is None or self._process != os.getpid():
                transport = httpx.HTTPTransport(uds=self._place.socket, limits=_LIMITS)
                headers = {"Content-Type": "application/json", **self._place.headers}
                self._client = httpx.Client(
                    transport=transport, base_url=self._place.url, headers=headers, timeout=_TIMEOUT, trust_env=False
                )
                self._process = os.getpid()
            return self._client


class AsyncLink:
    """Do what `Link` does, on the event loop."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(self, step: Send) -> wire.Reply | None:
        """Send a message; once more after a broken connection. Raises `ServerAway`."""
        client = self._own_client()
        for is_last in (False, True):
            try:
                answer = await client.post(step.path, content=msgspec.json.encode(step.message))
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                if is_last or not _may_repeat(step):
                    raise _away(error) from error
            except httpx.TransportError as error:
                raise _away(error) from error
            else:
                return _reply(answer)
        return None

    async def drive(self, steps: Steps) -> object:
        """Perform the steps, and return their result."""
        try:
            step = next(steps)
            while True:
                try:
                    reply = await self.send(step)
                except ServerAway as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            return end.value

    async def close(self) -> None:
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = None

    def _own_client(self) -> httpx.AsyncClient:
        """Return the client of this event loop."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            transport = httpx.AsyncHTTPTransport(uds=self._place.socket, limits=_LIMITS)
            headers = {"Content-Type": "application/json", **self._place.headers}
            self._client = httpx.AsyncClient(
                transport=transport, base_url=self._place.url, headers=headers, timeout=_TIMEOUT, trust_env=False
            )
            self._loop = loop
        return self._client


def _away(error: httpx.TransportError) -> ServerAway:
    return ServerAway(f"{type(error).__name__}: {error}")


def _may_repeat(step: Send) -> bool:
    """Say whether a message that came twice has one effect: not a charge of a request that nothing identifies."""
    return not isinstance(step.message, wire.Ask) or step.message.body_sha256 is not None


def _reply(answer: httpx.Response) -> wire.Reply | None:
    if answer.status_code == 204:
        return None
    try:
        reply = msgspec.json.decode(answer.content, type=wire.Reply)
    except msgspec.DecodeError as error:
        msg = f"status {answer.status_code}, and no answer of a merchant interface: {error}"
        raise ServerAway(msg) from error
    if isinstance(reply, wire.Failure):
        msg = f"{reply.code}: {reply.detail}"
        raise ServerAway(msg)
    return reply
