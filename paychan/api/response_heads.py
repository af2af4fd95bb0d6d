"""Heads of answers as bytes, with the header fields and the order of Tornado's; the constant parts are built once."""

from __future__ import annotations

import time
from functools import lru_cache

from tornado.httputil import format_timestamp

from paychan.api.responses import HEADERS, Answer

_BEFORE_DATE = ("Server", "Content-Type")

_FIRST = "".join(f"{name}: {HEADERS[name]}\r\n" for name in _BEFORE_DATE) + "Date: "
_LATER = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items() if name not in _BEFORE_DATE)


class Present:
    """The parts that depend on the time; they are built once a second."""

    second = 0
    """Unix time for which they were built."""
    date = b""
    accepted = b""
    """Head of the usual answer, to an accepted payment, up to the digits of Content-Length."""


@lru_cache(64)
def _line(status: int, reason: str | None) -> bytes:
    return f"HTTP/1.1 {status} {reason or 'OK'}\r\n{_FIRST}".encode("latin1")


_REST = f"\r\n{_LATER}".encode("latin1")


def update(second: int) -> None:
    """Build the parts for this second."""
    Present.second, Present.date = second, format_timestamp(second).encode()
    Present.accepted = b"%b%b%bContent-Length: " % (_line(200, "Payment accepted"), Present.date, _REST)


def laid_out(answer: Answer, closes: bool) -> bytes:
    """Build the bytes of an answer; `closes` adds `Connection: close`."""
    now = int(time.time())
    if now != Present.second:
        update(now)
    more = "".join(f"{name}: {value}\r\n" for name, value in answer.headers).encode("latin1") if answer.headers else b""
    size, end = len(answer.body), b"\r\nConnection: close\r\n\r\n" if closes else b"\r\n\r\n"
    line = _line(answer.status, answer.reason)
    return b"%b%b%b%bContent-Length: %d%b%b" % (line, Present.date, _REST, more, size, end, answer.body)
