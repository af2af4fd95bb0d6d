"""JSON-RPC to a bitcoind over HTTP: credentials from a file, retries while the node restarts, typed answers.

Every failure is a `ChainFailed`. A call that could not be sent, or whose connection broke, is repeated after a pause
that grows; so only repeatable methods may use this module. A call that timed out is not repeated.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from msgspec import Struct

from paychan.chain.base import ChainFailed, ChainRefused
from paychan.shared.tls import verification
from paychan.shared.wording import failure

_PAUSES_SECONDS = (0.1, 0.2, 0.4, 0.8)
"""Pauses between tries: a restart usually takes no longer. After them, the caller gets the error."""

_BATCH = 200
"""Most calls in one request. The node handles a batch on one of its few threads."""

_CONNECTIONS = 8
"""Most connections.

The node has 4 to 16 RPC threads; a scan, a rescan and a loading wallet each keep one busy for long.
"""

METHOD_NOT_FOUND = -32601
"""Bitcoin Core, rpc/protocol.h: RPC_METHOD_NOT_FOUND"""
WARMING_UP = -28
"""RPC_IN_WARMUP"""

_T = TypeVar("_T")


class Unreachable(ChainFailed):
    """No server answers at the URL, or it is no bitcoind."""


class Unauthorized(ChainFailed):
    """The node does not accept the credentials, or they can't be read."""


class RpcError(ChainRefused):
    """The node answered with an error. Codes are stable, texts are for people (Bitcoin Core, rpc/protocol.h)."""

    def __init__(self, method: str, code: int, reason: str) -> None:
        super().__init__(f"{method}: {reason} (code {code})")
        self.code = code
        self.reason = reason


class _Error(Struct, frozen=True):
    code: int
    message: str


class _Reply(Struct, frozen=True):
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error | None = None
    id: int = 0


class _Call(Struct, frozen=True):
    method: str
    params: Sequence[Any]
    id: int


_reply: msgspec.json.Decoder[_Reply] = msgspec.json.Decoder(_Reply)
_replies: msgspec.json.Decoder[list[_Reply]] = msgspec.json.Decoder(list[_Reply])


class JsonRpc:
    """A node at `url`. `credentials` is a file that holds "user:password", such as the node's own .cookie."""

    def __init__(self, url: str, credentials: Path, timeout_seconds: float) -> None:
        self.url = url.rstrip("/")
        self.credentials = credentials
        self.interruptions = 0
        """Number of times the node was absent or was replaced: its earlier answers may no longer hold."""
        self._authorization = ""
        self._client = httpx.AsyncClient(
            timeout=timeout_seconds,
            trust_env=False,
            limits=httpx.Limits(max_connections=_CONNECTIONS),
            verify=verification(url),
        )
        self._timeout_seconds = timeout_seconds

    async def call(
        self,
        decoder: msgspec.json.Decoder[_T],
        method: str,
        *params: Any,
        wallet: str = "",
        timeout_seconds: float | None = None,
    ) -> _T:
        """Call a method and decode its result; `timeout_seconds` replaces the default limit of one attempt.

        Raises:
            Unreachable, Unauthorized: the node did not execute the call.
            RpcError: the node answered with an error.
            ChainFailed: no answer in time, or one that can't be decoded.
        """
        body = await self._post(_Call(method, params, 0), method, wallet, timeout_seconds)
        reply = self._read(_reply, body)
        if reply.error is not None and reply.error.code == WARMING_UP:
            self.interruptions += 1
        return _result(method, reply, decoder)

    async def call_if_possible(
        self, default: _T, decoder: msgspec.json.Decoder[_T], method: str, *params: Any, wallet: str = ""
    ) -> _T:
        """Call a method that a node may lack, refuse or answer in another form (version, settings, -rpcwhitelist)."""
        try:
            return await self.call(decoder, method, *params, wallet=wallet)
        except RpcError as error:
            if error.code == WARMING_UP:
                raise
            return default
        except (ChainRefused, Unauthorized):
            return default

    async def batch(
        self, decoder: msgspec.json.Decoder[_T], method: str, params: Sequence[Sequence[Any]], wallet: str = ""
    ) -> list[_T]:
        """Call one method many times, and return the results in the order of `params`. Raises like `call`."""
        return [_result(method, reply, decoder) for reply in await self._batch(method, params, wallet)]

    async def batch_found(
        self, decoder: msgspec.json.Decoder[_T], method: str, params: Sequence[Sequence[Any]], wallet: str = ""
    ) -> list[_T | None]:
        """Do the same as `batch`, with None for each result that is an error of the node."""
        replies = await self._batch(method, params, wallet)
        return [None if reply.error is not None else _result(method, reply, decoder) for reply in replies]

    async def _batch(self, method: str, params: Sequence[Sequence[Any]], wallet: str) -> list[_Reply]:
        results: list[_Reply] = []
        for start in range(0, len(params), _BATCH):
            calls = [_Call(method, each, number) for number, each in enumerate(params[start : start + _BATCH])]
            replies = self._read(_replies, await self._post(calls, method, wallet, None))
            if sorted(reply.id for reply in replies) != list(range(len(calls))):
                msg = f"{method}: {len(replies)} answers to {len(calls)} calls"
                raise ChainFailed(msg)
            results += sorted(replies, key=lambda reply: reply.id)
        return results

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _post(
        self, content: _Call | list[_Call], method: str, wallet: str, timeout_seconds: float | None
    ) -> bytes:
        """Send a request, and return the JSON of the answer; try again after each pause while the node can't be reached."""
        for pause in _PAUSES_SECONDS:
            try:
                return await self._attempt(content, method, wallet, timeout_seconds)
            except Unreachable:
                self.interruptions += 1
                await asyncio.sleep(pause)
        return await self._attempt(content, method, wallet, timeout_seconds)

    async def _attempt(
        self, content: _Call | list[_Call], method: str, wallet: str, timeout_seconds: float | None
    ) -> bytes:
        response = await self._send(content, method, wallet, timeout_seconds)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            self.interruptions += 1
            self._authorization = ""  # a node writes a new cookie at every start: read it again
            response = await self._send(content, method, wallet, timeout_seconds)
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            msg = f"{self.url} refuses the credentials of {self.credentials} (HTTP {response.status_code})"
            raise Unauthorized(msg)
        if not response.headers.get("Content-Type", "").startswith("application/json"):
            # also 503 as text, when all of the node's threads are busy
            msg = f"{self.url} answered {method} without JSON (HTTP {response.status_code}: {response.text[:80]!r})"
            raise Unreachable(msg)
        return response.content

    async def _send(
        self, content: _Call | list[_Call], method: str, wallet: str, timeout_seconds: float | None
    ) -> httpx.Response:
        url = f"{self.url}/wallet/{quote(wallet, safe='')}" if wallet else self.url
        headers = {"Authorization": self._authorize(), "Content-Type": "application/json"}
        seconds = timeout_seconds or self._timeout_seconds
        try:
            return await self._client.post(url, content=msgspec.json.encode(content), headers=headers, timeout=seconds)
        except (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            msg = f"{self.url} can't be reached for {method}: {failure(error)}"
            raise Unreachable(msg) from error
        except httpx.TimeoutException as error:
            msg = f"{self.url} did not answer {method} within {seconds:g} s"
            raise ChainFailed(msg) from error
        except httpx.HTTPError as error:
            msg = f"{self.url}: {method} failed: {failure(error)}"
            raise ChainFailed(msg) from error

    async def listens(self) -> bool:
        """Return whether anything accepts connections at the node's address, whatever it is."""
        url = httpx.URL(self.url)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                _, writer = await asyncio.open_connection(url.host, url.port or 80)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    def _authorize(self) -> str:
        if httpx.URL(self.url).userinfo:
            msg = "the node's URL contains credentials: write them into a file as user:password"
            raise Unauthorized(msg)
        if not self._authorization:
            try:
                secret = self.credentials.read_bytes().strip()
            except OSError as error:
                msg = f"can't read {self.credentials}: {error.strerror}"
                raise Unauthorized(msg) from error
            self._authorization = "Basic " + base64.b64encode(secret).decode()
        return self._authorization

    def _read(self, decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
        try:
            return decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            msg = f"{self.url} is no bitcoind: {error}"
            raise Unreachable(msg) from error


def _result(method: str, reply: _Reply, decoder: msgspec.json.Decoder[_T]) -> _T:
    if reply.error is not None:
        raise RpcError(method, reply.error.code, reply.error.message)
    try:
        return decoder.decode(reply.result)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        msg = f"{method}: unexpected answer: {error}"
        raise ChainRefused(msg) from error
