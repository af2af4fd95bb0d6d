"""The plain form of a payment request: the only one that the fast lane takes.

httptools (llhttp, the parser of Node.js) reads it. Whatever is not plain is `NotFastPath`, be it an error or only rare: it is
Tornado's to read from its first byte, so what is odd is judged by one parser alone on both lanes. A plain request is
PUT on a channel in HTTP/1.1 with one Host, lines that end in CRLF, no body or one whose length is a plain number, and
nothing that asks for more (Expect, Upgrade, Transfer-Encoding, other words in Connection than keep-alive and close).

A client sends the same header lines with each of its payments. So what the parser made of them is kept, and the same
bytes again are not parsed again: then only the request line is looked at, whose target must be of the plainest characters.
"""

from __future__ import annotations

import re

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from paychan.api.budgets.head_limits import MOST_LINES

_BEGINNING, _VERSION = b"PUT /v", b" HTTP/1.1\r\n"
_HOST = re.compile(rb"[A-Za-z0-9.\-:\[\]]+")
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,8}")
_CONNECTION = {b"keep-alive": False, b"close": True}

_PLAINEST = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/?=&%+"
"""All that a target needs, and no parser stumbles over."""

_MOST_KNOWN = 8
"""Header lines kept of one connection: those of a client's payments differ in Content-Length alone, by a digit or two."""
_MOST_KNOWN_BYTES = 512


class NotFastPath(Exception):
    """Not a plain payment request."""


class RequestParser:
    """Reads the requests of one connection, one after the other; the methods `on_…` are the parser's to call."""

    __slots__ = (
        "_connections",
        "_fields",
        "_head_bytes",
        "_hosts",
        "_is_new",
        "_is_read",
        "_known",
        "_last_host",
        "_max_body_bytes",
        "_max_head_bytes",
        "_odd",
        "_parser",
        "_total_bytes",
        "body",
        "closes",
        "head",
        "url",
    )

    def __init__(self, max_head_bytes: int, max_body_bytes: int) -> None:
        self._max_head_bytes, self._max_body_bytes = max_head_bytes, max_body_bytes
        self._known: dict[bytes, tuple[int, bool]] = {}
        """Header lines, from the end of the request line: bytes of the body, and whether the connection shall end."""
        self.reset()

    def reset(self) -> None:
        """Begin anew, at the beginning of a request."""
        self._parser = HttpRequestParser(self)
        self._head_bytes = self._total_bytes = self._fields = self._hosts = 0
        self._connections = 0
        self._odd = self._is_read = self._is_new = self.closes = False
        self.url = self.head = self.body = self._last_host = b""

    @property
    def in_body(self) -> bool:
        """Whether a head is read whose body has not come whole."""
        return self._head_bytes > 0

    def has_new_head(self) -> bool:
        """Whether a head was read since this was asked last, and its body has not come whole."""
        is_new, self._is_new = self._is_new, False
        return is_new and self._head_bytes > 0

    def read(self, data: bytes) -> int:
        """Read a request at the beginning of what was received; return its size, or 0 if it has not come whole.

        Then `url`, `head`, `body` and `closes` (its connection shall end) are the request's. What was given once is given again, with what came since.

        Raises:
            Unusual: it is not plain, and never will be; `reset` before anything else is read.
        """
        head = self._head_bytes or self._read_head(data)
        size = self._total_bytes
        if not head or len(data) < size:
            return 0
        self.body = data[head:size]
        if not self._is_read:
            if self.body:
                self._parser.feed_data(self.body)
            if not self._is_read:
                raise NotFastPath
        self._head_bytes = 0
        return size

    def _read_head(self, data: bytes) -> int:
        """Read a head; return its size, or 0 if it has not come whole."""
        if not data.startswith(_BEGINNING) and not _BEGINNING.startswith(data):
            raise NotFastPath
        end = data.find(b"\r\n\r\n", 0, self._max_head_bytes) + 4  # as `headlimits` has it, which judges what is larger
        if end == 3:
            if len(data) >= self._max_head_bytes:
                raise NotFastPath
            return 0
        line = data.find(b"\r\n")
        target = data[4 : line - 9]
        known = self._known.get(data[line:end])
        if known is not None and data.startswith(_VERSION, line - 9) and not target.translate(None, _PLAINEST):
            body_bytes, self.closes = known
            self.url, self._total_bytes, self._is_read = target, end + body_bytes, True
        else:
            self._parse_head(data[:end])
            if len(self._known) < _MOST_KNOWN and end - line <= _MOST_KNOWN_BYTES:
                self._known[data[line:end]] = self._total_bytes - end, self.closes
        self.head = data[:end]
        self._head_bytes = end
        self._is_new = True
        return end

    def _parse_head(self, head: bytes) -> None:
        """Let httptools read a head, and see that it is plain."""
        if head.count(b"\n") > MOST_LINES:
            raise NotFastPath
        self.head = head
        self._fields = self._hosts = self._connections = 0
        self._is_read = self.closes = False
        self._total_bytes = len(head)
        try:
            self._parser.feed_data(head)
        except (HttpParserError, HttpParserUpgrade):
            raise NotFastPath from None
        # as many lines as fields, or one was folded or ended without CR
        if self._odd or self._hosts != 1 or self._fields + 2 != head.count(b"\n") or self._head_bytes:
            raise NotFastPath
        if self._total_bytes - len(head) > self._max_body_bytes or not head.startswith(_VERSION, 4 + len(self.url)):
            raise NotFastPath

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        judge = _FIELDS.get(name) or _FIELDS.get(name.lower())
        if judge is not None:
            judge(self, value)

    def on_message_complete(self) -> None:
        self._is_read = True

    def _host(self, value: bytes) -> None:
        self._hosts += 1
        if value != self._last_host:  # which it is nearly always
            self._odd |= not _HOST.fullmatch(value)
            self._last_host = value

    def _content_length(self, value: bytes) -> None:
        if self._total_bytes > len(self.head) or not _LENGTH.fullmatch(value):
            self._odd = True
        else:
            self._total_bytes += int(value)

    def _connection(self, value: bytes) -> None:
        self._connections += 1
        closes = _CONNECTION.get(value.lower())
        if closes is None or self._connections > 1:
            self._odd = True
        else:
            self.closes = closes

    def _more(self, _value: bytes) -> None:
        self._odd = True


_FIELDS = {
    b"Host": RequestParser._host,  # noqa: SLF001 - its own
    b"Content-Length": RequestParser._content_length,  # noqa: SLF001
    b"host": RequestParser._host,  # noqa: SLF001 - its own
    b"content-length": RequestParser._content_length,  # noqa: SLF001
    b"connection": RequestParser._connection,  # noqa: SLF001
    b"transfer-encoding": RequestParser._more,  # noqa: SLF001
    b"expect": RequestParser._more,  # noqa: SLF001
    b"upgrade": RequestParser._more,  # noqa: SLF001
}
