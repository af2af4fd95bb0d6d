"""What all handlers share: parameters read strictly, errors written in one place, CORS, and URLs for `Location`."""

from __future__ import annotations

import asyncio
import re
from time import monotonic
from typing import Any

import structlog
from tornado.web import HTTPError, RequestHandler

from paychan.api.service import Service
from paychan.protocol.channel import Accepted, Channel, Outcome, Rejected
from paychan.protocol.errors import (
    ApplicationRefused,
    BodyTooLarge,
    ChannelExists,
    InternalError,
    Malformed,
    MethodNotAllowed,
    Missing,
    NoSuchRoute,
    PaychanError,
    Repeated,
    Unavailable,
    UnknownChannel,
)
from paychan.protocol.rest import encode_json
from paychan.protocol.scripts import check_expiry
from paychan.protocol.types import OutPoint, UnixTime

log = structlog.get_logger("api")

_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]|<")
"""Tornado replaces a whole reason phrase that has a `<`."""

_MAX_REASON_CHARS = 200
_RETRY_AFTER_SECONDS = 5

_NOT_FOUND_SECONDS = 0.005
"""When a 404 leaves after its request was read, whatever was looked up meanwhile: who asks learns nothing from time."""

_TIMER_SECONDS = 0.001
"""The loop's timers count in this, from whenever they are set."""

OUTPOINT = r"([0-9a-f]{64})/(0|[1-9][0-9]{0,9})"
"""How a channel is named in a path: one name each."""


class Handler(RequestHandler):
    """Base of every handler; subclasses hold one resource each."""

    service: Service

    def initialize(self, service: Service) -> None:
        """Forget what the client calls its body: Tornado would read forms out of it (PROTOCOL §5, §6.7)."""
        self.service = service
        self.request.headers.pop("Content-Type", None)

    def set_default_headers(self) -> None:
        self.set_header("Server", "paychan")
        self.set_header("Content-Type", "application/json")
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Access-Control-Allow-Methods", "GET,POST,PUT,DELETE")
        self.set_header("Access-Control-Allow-Headers", "Origin,Accept,Content-Type")
        self.set_header("Access-Control-Expose-Headers", "Location")

    def prepare(self) -> None:
        self._began = monotonic()
        limit = self.service.config.http.max_body_bytes
        if len(self.request.body) > limit:
            raise BodyTooLarge(got_bytes=len(self.request.body), limit_bytes=limit)

    def compute_etag(self) -> str | None:
        """Answers about money are not cached: no hash of each."""
        return None

    def options(self, *_path: str) -> None:
        """CORS preflight: everything is in the headers."""
        self.set_status(200)

    # --- reading ----------------------------------------------------------------------------------------------------

    def parameter(self, name: str) -> str:
        """Return a query parameter.

        Raises:
            Missing, Repeated, Malformed: not exactly one, or not UTF-8.
        """
        values = self.request.query_arguments.get(name, [])
        if not values:
            raise Missing(field=name)
        if len(values) > 1:
            raise Repeated(field=name)
        try:
            return values[0].decode()
        except UnicodeDecodeError:
            raise Malformed(field=name, reason="not UTF-8") from None

    def expiry(self, text: str) -> UnixTime:
        """Read an expiry of ASCII digits. Raises `Malformed` or `ExpiryNotATime`."""
        return check_expiry(number(text, "exp_time"))

    def outpoint(self, txid: str, vout: str) -> OutPoint:
        """Read an outpoint from the path."""
        return OutPoint.parse(txid, number(vout, "funding_vout"))

    async def not_found(self) -> UnknownChannel:
        """Wait until the moment at which every 404 leaves.

        A timer alone would add whole milliseconds to the time that was spent, and so tell it: the last part is waited
        for in turns of the loop, which others use too.
        """
        spent = monotonic() - self._began
        leaves = self._began + _NOT_FOUND_SECONDS * (1 + spent // _NOT_FOUND_SECONDS)
        await asyncio.sleep(max(0.0, leaves - monotonic() - _TIMER_SECONDS))
        while monotonic() < leaves:  # noqa: ASYNC110 - a moment, not an event, is waited for
            await asyncio.sleep(0)
        return UnknownChannel()

    # --- writing ----------------------------------------------------------------------------------------------------

    def answer(self, status: int, reason: str | None, body: Any) -> None:
        """Write a result."""
        self.set_status(status, reason)
        self.finish(encode_json(body) + b"\n")

    def accepted(self, outcome: Outcome) -> Accepted:
        """Pass what was accepted, raise what was not."""
        if isinstance(outcome, Rejected):
            raise outcome.error
        return outcome

    def url(self, path: str) -> str:
        """Build an absolute URL: on the configured public base, else on the address the client itself used."""
        http = self.service.config.http
        if http.public_url:
            return http.public_url.rstrip("/") + path
        names = ("X-Forwarded-Host", "Host") if http.trust_forwarded else ("Host",)
        hosts = (self.request.headers.get(name, "") for name in names)
        host = next(filter(_HOST.fullmatch, hosts), None) or self._own_address()
        return f"{self.request.protocol}://{host}{path}"

    def _own_address(self) -> str:
        """Address and port at which the request arrived; nobody reads the answer of a connection that is gone."""
        stream = getattr(self.request.connection, "stream", None)
        if stream is None or stream.closed():
            return "localhost"
        host, port = stream.socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def error_body(self, error: PaychanError) -> dict[str, Any]:
        """Build the one error object that satisfies all published versions (PROTOCOL §5.7, §6.7)."""
        kind = "application_error" if isinstance(error, ApplicationRefused) else "payment_error"
        text = str(error)
        return {"code": error.code, "error": text, "error_msg": text, "type": kind, "message": text, **error.fields}

    def channel_path(self, outpoint: OutPoint) -> str:
        """Path of a channel in this version; a conflict's `Location`."""
        raise NotImplementedError

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Turn whatever was raised into status, reason phrase and body."""
        error = _refusal(kwargs.get("exc_info"), status_code, self.request.method or "")
        self.set_status(error.http_status, _NOT_PRINTABLE.sub("?", str(error))[:_MAX_REASON_CHARS])
        if isinstance(error, ChannelExists):
            self.set_header("Location", self.url(self.channel_path(_outpoint_of(error))))
        if isinstance(error, MethodNotAllowed):
            self.set_header("Allow", ",".join(self.methods()))
        if isinstance(error, Unavailable):
            self.set_header("Retry-After", str(_RETRY_AFTER_SECONDS))
        body = self.error_body(error)
        self.finish(encode_json(body) + b"\n" if body else b"")

    def methods(self) -> list[str]:
        """List what this resource answers to (RFC 9110: a 405 "MUST generate an Allow header field")."""
        return [name for name in self.SUPPORTED_METHODS if self._has(name.lower())]

    def _has(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(RequestHandler, method)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log bugs; a refusal is the client's to know."""
        if not isinstance(value, PaychanError | HTTPError):
            log.error("handler failed", path=self.request.path, exc_info=(typ, value, tb))


class NotFoundHandler(Handler):
    """Everything that is no resource of ours."""

    def prepare(self) -> None:
        raise NoSuchRoute


def number(text: str, field: str) -> int:
    """Read ASCII digits: `int()` alone would take signs, underscores and other scripts' digits.

    Raises:
        Malformed: anything else, or more digits than any field has.
    """
    if not re.fullmatch(r"[0-9]{1,16}", text):
        raise Malformed(field=field, reason="want decimal digits")
    return int(text)


def settlement_txid(channel: Channel) -> str | None:
    """Displayed txid of a channel's settlement, if it is signed."""
    if channel.closing is None or channel.closing.settlement is None:
        return None
    return channel.closing.settlement.txid[::-1].hex()


def _outpoint_of(error: ChannelExists) -> OutPoint:
    txid, vout = str(error.fields["outpoint"]).split(":")
    return OutPoint.parse(txid, int(vout))


def _refusal(exc_info: Any, status_code: int, method: str) -> PaychanError:
    """Find the refusal behind an exception; a bug shows nothing of itself."""
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
