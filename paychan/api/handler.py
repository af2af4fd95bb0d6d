"""Base of all Tornado handlers: strict reading of parameters, one form of errors, CORS, and URLs for `Location`."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any

import structlog
from tornado.web import HTTPError, RequestHandler

from paychan.api.budgets.penalty import Penalty
from paychan.api.responses import HEADERS, Answer, number, outpoint_of, parameter, refusal, result, when_404s_leave
from paychan.api.service import Service
from paychan.api.urls import absolute
from paychan.protocol.errors import (
    BodyTooLarge,
    ChannelExists,
    InternalError,
    Malformed,
    MethodNotAllowed,
    NoSuchRoute,
    NotFound,
    PaychanError,
    TooManyRequests,
)
from paychan.protocol.expiry import check_expiry
from paychan.protocol.types import OutPoint, UnixTime
from paychan.tracing import begin_request, enter_channel

log = structlog.get_logger("api")

_SUCCESS = (200, 201, 202)


class Handler(RequestHandler):
    """Base of every handler; subclasses hold one resource each."""

    service: Service
    quiet_404 = False
    to_operator = False
    serves_clients = True

    def initialize(self, service: Service) -> None:
        """Set the service; remove Content-Type, or Tornado would parse the body as a form (RBPCP §5, §6.7)."""
        self.service = service
        context: Any = self.request.connection.context  # type: ignore[union-attr] # Tornado's own
        self.holder = context.holder
        self._began = getattr(context, "began", None) or asyncio.get_running_loop().time()
        self.request.headers.pop("Content-Type", None)

    async def _execute(self, transforms: Any, *args: Any, **kwargs: Any) -> None:
        """Run the handler as Tornado does. A request that is cancelled because the server stops is not an error."""
        with contextlib.suppress(asyncio.CancelledError):
            await super()._execute(transforms, *args, **kwargs)

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        begin_request()
        if self.serves_clients:
            self.service.unbelieved.look(self.request.headers)
        self._heed_close()
        if len(self.path_args) == 2 and len(self.path_args[0]) == 64:  # a channel: txid and output
            enter_channel(":".join(self.path_args))
        self.service.keep(asyncio.current_task())
        self.holder.start_work()
        problem = self.penalty.problem()
        if problem is not None:
            self._close_after_answer()
            raise problem
        limit = self.service.config.http.max_body_bytes
        if len(self.request.body) > limit:
            raise BodyTooLarge(got_bytes=len(self.request.body), limit_bytes=limit)

    def compute_etag(self) -> str | None:
        """Compute no hash of an answer: answers about money are not cached."""
        return None

    def options(self, *_path: str) -> None:
        """Answer a CORS preflight, and what methods there are."""
        self.set_header("Allow", ",".join(self.methods()))
        self.set_status(200)

    async def head(self, *path: str) -> None:
        """Answer as for GET; Tornado leaves the body out.

        RFC 9110 9.3.2: "The HEAD method is identical to GET except that the server MUST NOT send content in the response".
        """
        answering = self.get(*path)
        if answering is not None:
            await answering

    # --- connection -------------------------------------------------------------------------------------------------

    def _heed_close(self) -> None:
        """Close the connection after the answer if the client asks for it.

        RFC 9112 9.6: "A server that receives a "close" connection option MUST initiate closure of the connection", also if
        it is one of several options, which Tornado does not read.
        """
        options = self.request.headers.get("Connection", "").lower().split(",")
        if "close" in (option.strip() for option in options):
            self._close_after_answer()

    def _close_after_answer(self) -> None:
        connection: Any = self.request.connection
        connection._disconnect_on_finish = True  # noqa: SLF001 - Tornado has no public way to close

    def flush(self, include_footers: bool = False) -> asyncio.Future[None]:
        """Write the answer, and tell a client of HTTP/1.0 that the connection ends, too.

        RFC 9112 9.6: "The server SHOULD send a "close" connection option in its final response on that connection".
        """
        connection: Any = self.request.connection
        if self.request.version == "HTTP/1.0" and connection._disconnect_on_finish:  # noqa: SLF001 - as above
            self.set_header("Connection", "close")
        return super().flush(include_footers)

    # --- reading ----------------------------------------------------------------------------------------------------

    def parameter(self, name: str) -> str:
        """Return a query parameter. Raises `Missing`, `Repeated` or `Malformed`."""
        return parameter(self.request.query_arguments, name)

    def expiry(self, text: str) -> UnixTime:
        """Read an expiry of ASCII digits. Raises `Malformed` or `ExpiryNotATime`."""
        return check_expiry(number(text, "exp_time"))

    # --- penalty ----------------------------------------------------------------------------------------------------

    @property
    def penalty(self) -> Penalty:
        """The penalty of this connection; it also counts the requests that the fast path refused on it."""
        context: Any = self.request.connection.context  # type: ignore[union-attr] # Tornado's own
        if not hasattr(context, "penalty"):
            http = self.service.config.http
            context.penalty = Penalty(http.max_bad_signatures, closes=not http.trust_forwarded)
        penalty: Penalty = context.penalty
        return penalty

    def limit_rate(self) -> None:
        """Count a request that costs work in the signer or the node. Raises `TooManyRequests`."""
        address = self.service.client_address(self.request.headers, self.request.remote_ip or "")
        wait_seconds = self.service.request_rates.wait_seconds(address)
        if wait_seconds:
            raise TooManyRequests(limit=self.service.config.http.asks_per_second, wait_seconds=wait_seconds)

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Answer a refusal after the delay of the connection's penalty.

        For a 404 that delay starts at `when_404s_leave`.
        """
        error = _refusal(kwargs.get("exc_info"), status_code, self.request.method or "")
        self.service.context.observers.report_refusal(error.code)
        wait = self.penalty.refused(error)
        if not wait:
            super().send_error(status_code, **kwargs)
            return
        loop = asyncio.get_running_loop()
        leaves = when_404s_leave(self._began) if isinstance(error, NotFound) else loop.time()
        self.holder.end_work()
        loop.call_at(leaves + wait, partial(super().send_error, status_code, **kwargs))

    def on_finish(self) -> None:
        self.holder.end_work()
        if self.request.method in ("PUT", "POST") and self.get_status() in _SUCCESS:
            self.holder.paid = True

    # --- writing ----------------------------------------------------------------------------------------------------

    def give(self, answer: Answer) -> None:
        """Write an answer."""
        self.set_status(answer.status, answer.reason)
        for name, value in answer.headers:
            self.set_header(name, value)
        self.finish(answer.body)

    def answer(self, status: int, reason: str | None, value: Any) -> None:
        """Write a result."""
        self.give(result(status, reason, value))

    def url(self, path: str) -> str:
        """Build an absolute URL; see `absolute`."""
        stream = getattr(self.request.connection, "stream", None)
        own = None if stream is None or stream.closed() else stream.socket.getsockname()
        return absolute(self.service.config.http, self.request.headers, own, path)

    def channel_path(self, outpoint: OutPoint) -> str:
        """Return a channel's path in this protocol version, for the `Location` of a conflict."""
        raise NotImplementedError

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Write the exception of a handler as status, reason phrase and body."""
        error = _refusal(kwargs.get("exc_info"), status_code, self.request.method or "")
        if isinstance(error, ChannelExists):
            self.set_header("Location", self.url(self.channel_path(outpoint_of(error))))
        if isinstance(error, MethodNotAllowed):
            self.set_header("Allow", ",".join(self.methods()))
        self.give(refusal(error, quiet_404=self.quiet_404, to_operator=self.to_operator))

    def methods(self) -> list[str]:
        """List the methods of this resource (RFC 9110: a 405 "MUST generate an Allow header field")."""
        return [name for name in self.SUPPORTED_METHODS if self._has(name.lower())]

    def _has(self, method: str) -> bool:
        name = "get" if method == "head" else method  # HEAD is GET without the body
        return getattr(type(self), name) is not getattr(RequestHandler, name)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log bugs. A refusal goes to the client and not to the log."""
        if not isinstance(value, PaychanError | HTTPError):
            log.error("handler failed", path=self.request.path, exc_info=(typ, value, tb))


class NotFoundHandler(Handler):
    """Answers 404 to every path that is not a resource of this server."""

    def prepare(self) -> None:
        super().prepare()
        raise NoSuchRoute


def _refusal(exc_info: Any, status_code: int, method: str) -> PaychanError:
    """Return the refusal for an exception. For a bug it is `InternalError`, which has no details."""
    error = exc_info[1] if exc_info else None
    if isinstance(error, PaychanError):
        return error
    if status_code == 405:
        return MethodNotAllowed(method=method)
    if status_code == 404:
        return NoSuchRoute()
    if 400 <= status_code < 500:
        return Malformed(field="request", reason=str(getattr(error, "log_message", None) or "can't be read"))
    return InternalError()
