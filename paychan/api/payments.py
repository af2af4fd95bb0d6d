"""The fast lane: payments past Tornado's handler classes, which cost more than verifying and storing a payment.

Tornado's server reads the request and keeps its limits as ever. `PaymentLane` stands between it and the application:
it takes `PUT` on a channel for itself and passes everything else on. What is done, answered and refused is the same on
both ways (`v1.pay`, `v2.pay`, `answers`); the setting `http.fast_lane` chooses.
"""

from __future__ import annotations

import asyncio
import re
import time
from functools import partial
from typing import Any

import structlog
from tornado.escape import parse_qs_bytes
from tornado.http1connection import HTTP1Connection
from tornado.httputil import (
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
    format_timestamp,
)

from paychan.api import v1, v2
from paychan.api.answers import HEADERS, OUTPOINT, Answer, outpoint, refusal, until_404s_leave
from paychan.api.service import Service
from paychan.api.urls import absolute
from paychan.protocol.errors import BodyTooLarge, InternalError, PaychanError, UnknownChannel

log = structlog.get_logger("api")

_HEAD = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())

_PAY_PATH = re.compile(rf"/(?:(v1)/channels/{OUTPOINT}(?:/pay)?|(v2)/channels/{OUTPOINT})")

_MAX_QUERY_FIELDS = 1000
"""Tornado's own limit."""


class PaymentLane(HTTPServerConnectionDelegate):
    """Takes the payments out of a server's requests."""

    def __init__(self, service: Service, others: HTTPServerConnectionDelegate) -> None:
        self._service = service
        self._others = others
        self._running: set[asyncio.Task[None]] = set()
        self._waiting: dict[object, tuple[float, Any]] = {}

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate:
        self._waiting[server_conn] = time.monotonic(), request_conn
        has_come = partial(self._waiting.pop, server_conn, None)
        return _Fork(self, has_come, partial(self._others.start_request, server_conn, request_conn), request_conn)

    def on_close(self, server_conn: object) -> None:
        self._waiting.pop(server_conn, None)
        self._others.on_close(server_conn)

    async def close_idle(self, idle_seconds: float) -> None:
        """Close, for ever, what waits too long for the head of a request.

        One look at all of them now and then instead of Tornado's timer for each request, which costs as much as half
        a signature check.
        """
        while True:
            await asyncio.sleep(min(1.0, idle_seconds / 4))
            limit = time.monotonic() - idle_seconds
            for server_conn, (since, connection) in list(self._waiting.items()):
                if since < limit:
                    self._waiting.pop(server_conn, None)
                    connection.close()

    def payment(self, connection: HTTP1Connection, path: re.Match[str], query: str) -> _PaymentRequest:
        return _PaymentRequest(self._service, self._running, connection, path, query)


class _Fork(HTTPMessageDelegate):
    """Waits for the request line, and becomes one of the two ways."""

    def __init__(self, lane: PaymentLane, has_come: Any, other: Any, connection: HTTP1Connection) -> None:
        self._lane, self._has_come, self._other, self._connection = lane, has_come, other, connection
        self._way: HTTPMessageDelegate = self

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> Any:
        self._has_come()
        request: RequestStartLine = start_line
        path, _, query = request.path.partition("?")
        match = _PAY_PATH.fullmatch(path) if request.method == "PUT" else None
        self._way = self._lane.payment(self._connection, match, query) if match else self._other()
        return self._way.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Any:
        return self._way.data_received(chunk)

    def finish(self) -> None:
        self._way.finish()

    def on_connection_close(self) -> None:
        if self._way is not self:
            self._way.on_connection_close()


class _PaymentRequest(HTTPMessageDelegate):
    """One payment: gathers the body, pays, answers."""

    def __init__(
        self,
        service: Service,
        running: set[asyncio.Task[None]],
        connection: HTTP1Connection,
        path: re.Match[str],
        query: str,
    ) -> None:
        self._service, self._running, self._connection = service, running, connection
        self._path, self._query = path, query
        self._body = b""
        self._headers, self._protocol = HTTPHeaders(), "http"
        self._asks_about_connection = True

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        """Of the head a payment needs nothing but the way back, yet what Tornado demands of heads is demanded here too.

        Raises:
            HTTPInputError: not one Host header, or too many query fields; Tornado answers 400 and closes.
        """
        # RFC 9112: "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1 request message that
        # lacks a Host header field and to any request message that contains more than one Host header field line"
        if "," in headers.get("Host", "" if start_line.version == "HTTP/1.0" else ","):
            raise HTTPInputError("want one Host header")  # noqa: EM101, TRY003 - for Tornado's log
        if self._query.count("&") >= _MAX_QUERY_FIELDS:
            raise HTTPInputError("too many query fields")  # noqa: EM101, TRY003
        context: Any = self._connection.context
        self._headers, self._protocol = headers, context.protocol
        keep_alive = headers.get("Connection", "keep-alive").lower() == "keep-alive"
        self._asks_about_connection = start_line.version != "HTTP/1.1" or not keep_alive

    def data_received(self, chunk: bytes) -> None:
        self._body += chunk

    def finish(self) -> None:
        task = asyncio.get_running_loop().create_task(self._respond())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def on_connection_close(self) -> None:
        """The payment goes on; its answer finds nobody."""

    async def _respond(self) -> None:
        began = time.monotonic()
        quiet = self._path[1] is None
        try:
            answer = await self._pay()
        except UnknownChannel as error:
            await until_404s_leave(began)
            answer = refusal(error, quiet_404=quiet)
        except PaychanError as error:
            answer = refusal(error, quiet_404=quiet)
        except Exception:
            log.exception("payment failed", path=self._path[0])
            answer = refusal(InternalError(), quiet_404=quiet)
        self._write(answer)

    async def _pay(self) -> Answer:
        limit = self._service.config.http.max_body_bytes
        if len(self._body) > limit:
            raise BodyTooLarge(got_bytes=len(self._body), limit_bytes=limit)
        arguments = _arguments(self._query)
        if self._path[1]:
            return await v1.pay(self._service, outpoint(self._path[2], self._path[3]), arguments)
        named = outpoint(self._path[5], self._path[6])
        return await v2.pay(self._service, named, arguments, self._body, self._url)

    def _url(self, path: str) -> str:
        return absolute(self._service.config.http, self._protocol, self._headers, self._connection.stream, path)

    def _write(self, answer: Answer) -> None:
        """Write head and body in one piece; what a client asks about its connection is Tornado's to answer."""
        if self._asks_about_connection or answer.headers:
            headers = HTTPHeaders({**HEADERS, **dict(answer.headers)})
            headers["Date"] = _date(int(time.time()))
            headers["Content-Length"] = str(len(answer.body))
            start_line = ResponseStartLine("HTTP/1.1", answer.status, answer.reason or "OK")
            self._connection.write_headers(start_line, headers, answer.body)
        elif not self._connection.stream.closed():
            self._connection.stream.write(_plain(answer))
        self._connection.finish()


def _plain(answer: Answer) -> bytes:
    """Lay out an answer whose headers are those of every answer."""
    head = (
        f"HTTP/1.1 {answer.status} {answer.reason or 'OK'}\r\n{_HEAD}Date: {_date(int(time.time()))}\r\n"
        f"Content-Length: {len(answer.body)}\r\n\r\n"
    )
    return head.encode("latin1") + answer.body


def _arguments(query: str) -> dict[str, list[bytes]]:
    """Read a query; nearly all are one plain field, which needs no unquoting."""
    if not query or any(mark in query for mark in "&%+"):
        return parse_qs_bytes(query, keep_blank_values=True)
    name, _, value = query.partition("=")
    return {name: [value.encode("latin1")]}


def _date(now: int, last: list[Any] = [0, ""]) -> str:  # noqa: B006 - kept from call to call
    """HTTP's date, made once a second."""
    if last[0] != now:
        last[:] = [now, format_timestamp(now)]
    return str(last[1])
