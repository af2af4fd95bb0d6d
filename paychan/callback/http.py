"""Requests to the application over HTTP: the question `value_received` of rbpcp-api (RBPCP §13.1), and messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx
from msgspec import Struct

from paychan.callback.answers import MAX_ANSWER_BYTES, verdict
from paychan.callback.base import ApplicationSilent, MessageRefused, Silence, Verdict
from paychan.callback.messages import question
from paychan.callback.signing import signature_headers
from paychan.protocol.channel import Channel
from paychan.protocol.types import Network, UnixTime
from paychan.protocol.wire.rbpcp import encode_json
from paychan.shared.tls import verification
from paychan.shared.wording import failure

_HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}


_QUESTIONS, _MESSAGES = "/value_received", "/channel_event"


class _Response(Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpApplication:
    """Asks with a POST to `{url}/value_received`, tells with a POST to `{url}/channel_event`; follows no redirect.

    Every request is signed with all `keys`, see `signing`. No answer is read beyond the longest valid one.
    """

    def __init__(
        self, url: str, timeout_seconds: float, network: Network, keys: Sequence[bytes], clock: Callable[[], UnixTime]
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._network = network
        self._keys = keys
        self._clock = clock
        self._silences: dict[str, Silence] = {}
        self._client = httpx.AsyncClient(
            timeout=timeout_seconds, follow_redirects=False, trust_env=False, verify=verification(url)
        )

    @property
    def silence(self) -> Silence | None:
        return self._silences.get(_QUESTIONS)

    @property
    def silence_to_messages(self) -> Silence | None:
        return self._silences.get(_MESSAGES)

    async def ask(self, channel: Channel) -> Verdict:
        content = question(channel, self._network)
        with self._noting(_QUESTIONS):
            response = await self._post(_QUESTIONS, content.idempotency_key, encode_json(content))
            return verdict(response.status, response.headers, response.body)

    async def tell(self, message_id: str, body: bytes) -> None:
        """Deliver a message about a channel: any status of 2xx acknowledges it, whatever the body says.

        Raises:
            MessageRefused: another status.
            ApplicationSilent: no answer.
        """
        with self._noting(_MESSAGES):
            response = await self._post(_MESSAGES, message_id, body)
            if response.status // 100 != 2:
                msg = f"status {response.status} for {_MESSAGES}, need 2xx"
                raise MessageRefused(msg)

    async def close(self) -> None:
        await self._client.aclose()

    @contextmanager
    def _noting(self, path: str) -> Iterator[None]:
        """Note since when this path gives no valid answers."""
        try:
            yield
        except ApplicationSilent as error:
            before = self._silences.get(path)
            self._silences[path] = Silence(before.since if before else self._clock(), str(error))
            raise
        self._silences.pop(path, None)

    async def _post(self, path: str, message_id: str, content: bytes) -> _Response:
        headers = _HEADERS | {"Idempotency-Key": message_id}
        headers |= signature_headers(self._keys, message_id, self._clock(), content)
        try:
            async with asyncio.timeout(self._timeout_seconds):  # httpx's own time-out restarts with every byte
                return await self._exchange(self._url + path, content, headers)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise ApplicationSilent(failure(error)) from error

    async def _exchange(self, url: str, content: bytes, headers: dict[str, str]) -> _Response:
        body = b""
        async with self._client.stream("POST", url, content=content, headers=headers) as response:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    break
        return _Response(response.status_code, response.headers, body[: MAX_ANSWER_BYTES + 1])
