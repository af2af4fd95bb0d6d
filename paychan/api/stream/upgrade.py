"""The request that begins a stream: the connection itself checks it and becomes a WebSocket (RFC 6455 4.2).

The connection's transport stays the same; only its protocol changes, from HTTP to the WebSocket. A request that can't
begin a stream, or is written in an unusual way, is not taken here: Tornado reads and answers it (`handler.py`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, Protocol

import structlog
from tornado.escape import parse_qs_bytes
from tornado.httputil import HTTPHeaders, HTTPInputError

from paychan.api.budgets.penalty import Penalty
from paychan.api.response_heads import laid_out
from paychan.api.responses import OUTPOINT, outpoint, refusal, when_404s_leave
from paychan.api.service import Service
from paychan.api.stream.reader import WebSocket
from paychan.api.stream.session import StreamSession
from paychan.api.stream.websocket import accept_head, upgrade_problem
from paychan.api.urls import absolute
from paychan.api.v2 import find_channel
from paychan.protocol.errors import InternalError, NotFound, PaychanError
from paychan.protocol.types import OutPoint
from paychan.tracing import begin_request, enter_channel

log = structlog.get_logger("stream")

_REQUEST = re.compile(rf"GET (?:https?://([^/?#]+))?/v2/channels/{OUTPOINT}/stream(?:\?([!-~]*))? HTTP/1\.1")
"""RFC 6455 4.2.1: the target may be "an absolute HTTP/HTTPS URI containing the /resource name/"."""
_HOST = re.compile(r"[A-Za-z0-9._~%:\[\]-]+")
_BODY_FIELDS = ("Transfer-Encoding", "Expect")

_FRAME_FACTOR = 16
"""Largest frame, in units of `http.max_body_bytes`."""


class Host(Protocol):
    """The connection, as the upgrade sees it."""

    address: Any
    evictor: Any
    penalty: Penalty
    transport: asyncio.Transport

    def start_work(self) -> None: ...

    def end_work(self) -> None: ...

    def come_back(self, rest: bytes) -> None:
        """Go on with HTTP, with the bytes that were received after the request."""

    def become(self, websocket: WebSocket, head: bytes, rest: bytes) -> None:
        """Hand the connection to the WebSocket, which writes `head` and reads `rest` first."""

    def close_after(self, answer: bytes) -> None:
        """Write an answer and close."""


class Request(NamedTuple):
    """A request to begin a stream."""

    named: OutPoint
    query: str
    headers: HTTPHeaders
    rest: bytes
    """The bytes after it, which belong to the stream."""

    @property
    def closes(self) -> bool:
        """Whether the client wants the connection closed after a refusal."""
        return "close" in self.headers["Connection"].lower()


def read_request(head: bytes, rest: bytes) -> Request | None:
    """Read a head, which ends with its empty line; None: it is not the usual request to begin a stream.

    `rest` is what was received after it.
    """
    line, _, fields = head.decode("latin1").partition("\r\n")
    match = _REQUEST.fullmatch(line)
    if match is None:
        return None
    try:
        headers = HTTPHeaders.parse(fields)
        named = outpoint(match[2], match[3])
    except (HTTPInputError, PaychanError):
        return None
    hosts = headers.get_list("Host")
    has_body = headers.get("Content-Length", "0") != "0" or any(name in headers for name in _BODY_FIELDS)
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]) or has_body:
        return None
    if match[1] is not None:  # RFC 9112 3.2.2: it counts instead of Host
        if not _HOST.fullmatch(match[1]):
            return None
        headers["Host"] = match[1]
    return None if upgrade_problem(headers) else Request(named, match[4] or "", headers, rest)


class Upgrade:
    """One request to begin a stream, on its connection."""

    def __init__(self, service: Service, host: Host, request: Request) -> None:
        self._service, self._host, self._request = service, host, request
        self._began = asyncio.get_running_loop().time()
        self._task: asyncio.Task[None] | None = None
        self._websocket: WebSocket | None = None

    def begin(self) -> None:
        """Check the request, unless the connection has ended."""
        if not self._host.transport.is_closing():
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._service.keep(self._task)

    def abort(self) -> None:
        """Stop it at any stage."""
        if self._websocket is not None:
            self._websocket.abort()
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Stop it, and wait until it has ended."""
        self.abort()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        began, named = monotonic(), self._request.named
        begin_request()
        self._service.unbelieved.look(self._request.headers)
        enter_channel(named)
        self._host.start_work()
        status = 101
        try:
            await self._begin_stream()
        except PaychanError as error:
            status = error.http_status
            await self._refuse(error)
        except Exception:
            log.exception("stream failed", channel=str(named))
            status = 500
            await self._refuse(InternalError())
        if self._service.config.log.access:
            path = f"/v2/channels/{named.txid_hex}/{named.vout}/stream"
            ms = round(1000 * (monotonic() - began), 2)
            structlog.get_logger("access").info("request", method="GET", path=path, status=status, ms=ms)

    async def _begin_stream(self) -> None:
        """Make the stream. A secret in the request is checked before; one in the first message by the session."""
        service, host, request = self._service, self._host, self._request
        if (problem := host.penalty.problem()) is not None:
            raise problem
        url = partial(absolute, service.config.http, request.headers, host.transport.get_extra_info("sockname"))
        address = service.client_address(request.headers, _ip(host.address))
        session = StreamSession(service, request.named, address, url)
        limit = service.config.http.max_body_bytes * _FRAME_FACTOR
        websocket = WebSocket(session, service.turns, limit, service.config.stream.ping_seconds)
        self._websocket, session.websocket, session.holder = websocket, websocket, host
        host.evictor = websocket.abort
        try:
            if arguments := _secret(request):
                session.begin(await find_channel(service, request.named, arguments))
            else:
                session.wait()
                host.end_work()
        except BaseException:
            host.evictor = None
            websocket.abort()
            raise
        host.become(websocket, accept_head(request.headers["Sec-WebSocket-Key"]), request.rest)

    async def _refuse(self, error: PaychanError) -> None:
        """Answer a refusal after the delay of the connection's penalty; a 404 leaves at its fixed time."""
        host, loop = self._host, asyncio.get_running_loop()
        self._service.context.observers.report_refusal(error.code)
        is_last = host.penalty.problem() is not None
        wait = host.penalty.refused(error)
        host.end_work()
        if wait:
            leaves = when_404s_leave(self._began) if isinstance(error, NotFound) else loop.time()
            await asyncio.sleep(leaves + wait - loop.time())
        closes = is_last or self._request.closes
        answer = laid_out(refusal(error, quiet_404=True), closes)
        if closes:
            host.close_after(answer)
        else:
            host.transport.write(answer)
            host.come_back(self._request.rest)


def _ip(peer: Any) -> str:
    """Return the IP address of a socket's peer; "" for a closed socket."""
    return peer[0] if isinstance(peer, tuple) and peer else ""


def _secret(request: Request) -> Mapping[str, Sequence[bytes]]:
    """Return the secret of the header `Authorization: Bearer …`, else the query."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return {"secret": [secret.strip().encode("latin1")]}
    return parse_qs_bytes(request.query, keep_blank_values=True)
