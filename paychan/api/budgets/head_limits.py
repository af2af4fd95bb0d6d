"""How large the head of a request may be. One that is larger is refused before a parser sees it, and its connection ends.

A parser makes objects of each header line: two thousand lines in 8 KiB take Tornado as long as two hundred payments.
"""

from __future__ import annotations

from paychan.protocol.errors import HeadTooLarge, RequestLineTooLong

MOST_LINES = 100
"""Header lines. Clients send about ten, browsers behind proxies about thirty."""

_ENDS = (b"\n\r\n", b"\n\n")
"""An empty line, to Tornado with or without CR."""


def size_of_head(data: bytes | bytearray, limit_bytes: int) -> int:
    """Return how many bytes of this the head of its first request has, or 0 if that has not come whole.

    Raises:
        RequestLineTooLong: there is no end of a line within the limit (RFC 9112 3: a server "MUST respond with a 414").
        HeadTooLarge: the head does not end within the limit, or has too many lines.
    """
    found = [at + len(end) for end in _ENDS if (at := data.find(end, 0, limit_bytes)) >= 0]
    size = min(found, default=0)
    if not size and len(data) > limit_bytes:
        if data.find(b"\n", 0, limit_bytes) < 0:
            raise RequestLineTooLong(limit_bytes=limit_bytes)
        raise HeadTooLarge(limit_bytes=limit_bytes, limit_lines=MOST_LINES)
    if data.count(b"\n", 0, size or limit_bytes) > MOST_LINES + 2:  # with the request line and the empty one
        raise HeadTooLarge(limit_bytes=limit_bytes, limit_lines=MOST_LINES)
    return size
