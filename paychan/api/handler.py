"""What all handlers share: parameters read strictly, errors written in one place, CORS, and URLs for `Location`."""

from __future__ import annotations

import re
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
)
from paychan.protocol.rest import encode_json
from paychan.protocol.scripts import check_expiry
from paychan.protocol.types import OutPoint, UnixTime

log = structlog.get_logger("api")

_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")
_MAX_REASON_CHARS = 200
_RETRY_AFTER_SECONDS = 5

OUTPOINT = r"([0-9a-f]{64})/([0-9]{1,10})"
"""How a channel is named in a path."""


class Handler(RequestHandler):
    """Base of every handler; subclasses hold one resource each."""

    service: Service

    def initialize(self, service: Service) -> None:
        self.service = service

    def set_default_headers(self) -> None:
        self.set_header("Server", "paychan")
        self.set_header("Content-Type", "application/json")
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Access-Control-Allow-Methods", "GET,POST,PUT,DELETE")
        self.set_header("Access-Control-Allow-Headers", "Origin,Accept,Content-Type")
        self.set_header("Access-Control-Expose-Headers", "Location")

    def prepare(self) -> None:
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
        host = self.request.headers.get("X-Forwarded-Host", "") if http.trust_forwarded else ""
        host = host or self.request.host
        if not _HOST.fullmatch(host):
            host = f"{http.listen}:{self.service.config.port}"
        return f"{self.request.protocol}://{host}{path}"

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
        if isinstance(error, Unavailable):
            self.set_header("Retry-After", str(_RETRY_AFTER_SECONDS))
        body = self.error_body(error)
        self.finish(encode_json(body) + b"\n" if body else b"")

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
