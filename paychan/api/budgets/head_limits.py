"""The size limit of a request's head. A larger head is refused before a parser reads it, and its connection is closed.

A parser makes objects for each header line: for 2,000 lines in 8 KiB Tornado needs as long as for 200 payments.
"""

from __future__ import annotations

import re

from paychan.protocol.errors import HeadTooLarge, RequestLineTooLong

MOST_LINES = 100
"""Header lines. Clients send about ten, browsers behind proxies about thirty."""

_CONTENT_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r?\n")

_ENDS = (b"\n\r\n", b"\n\n")
"""An empty line; Tornado accepts it with or without CR."""


def size_of_head(data: bytes | bytearray, limit_bytes: int) -> int:
    """Return the size in bytes of the request head that `data` begins with, or 0 if the head is incomplete.

    Raises:
        RequestLineTooLong: no line ends within the limit (RFC 9112 3: a server "MUST respond with a 414").
        HeadTooLarge: the head does not end within the limit, or has too many lines.
    """
    found = [at + len(end) for end in _ENDS if (at := data.find(end, 0, limit_bytes)) >= 0]
    size = min(found, default=0)
    if not size and len(data) > limit_bytes:
        if data.find(b"\n", 0, limit_bytes) < 0:
            raise RequestLineTooLong(limit_bytes=limit_bytes)
        raise HeadTooLarge(limit_bytes=limit_bytes, limit_lines=MOST_LINES)
    if data.count(b"\n", 0, size or limit_bytes) > MOST_LINES + 2:  # plus the request line and the empty line
        raise HeadTooLarge(limit_bytes=limit_bytes, limit_lines=MOST_LINES)
    return size


def size_of_body(head: bytes) -> int:
    """Return the body size in bytes that a complete head announces; 0 if it is unknown, or the client waits for a 100."""
    lower = head.lower()
    if b"\ntransfer-encoding:" in lower or b"\nexpect:" in lower:
        return 0
    sizes = _CONTENT_LENGTH.findall(lower)
    return int(sizes[0]) if len(sizes) == 1 else 0
