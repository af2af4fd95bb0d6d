"""Parses plain payment requests, the only requests that the fast path serves.

A plain request is PUT on a channel in HTTP/1.1 with exactly one Host, lines that end in CRLF, no body or a
Content-Length in plain digits, no Expect, Transfer-Encoding or Upgrade to a protocol, and no Connection option other
than keep-alive, close and upgrade. nginx as usually configured for WebSockets sends `Connection: upgrade` with all
requests, also with those that have no Upgrade or an empty one; then the option means nothing. HTTP/1.0 without
keep-alive, which nginx speaks by default, is plain too. httptools (llhttp, the parser of Node.js) reads it. For every
other request, valid or not, this parser raises `NotFastPath`. Tornado then reads the request from its first byte. So one
parser decides about unusual requests, with and without the fast path.

A client sends the same header lines with each of its payments. So the result of parsing them is cached by their bytes.
On a hit only the request line is checked, and its target may have only the characters of `_PLAINEST`.
"""

from __future__ import annotations

import re

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from paychan.api.budgets.head_limits import MOST_LINES

_BEGINNING, _VERSION, _OLD_VERSION = b"PUT /v", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n"
_HOST = re.compile(rb"[A-Za-z0-9._\-:\[\]]+")
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,8}")
_OPTIONS = frozenset((b"keep-alive", b"close", b"upgrade"))

_PLAINEST = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/?=&%+"
"""The characters of a usual target; all parsers agree on them."""

_MOST_KNOWN = 8
"""Cached header blocks of one connection: the payments of a client differ only in the digits of Content-Length."""
_MOST_KNOWN_BYTES = 512


class NotFastPath(Exception):
    """Not a plain payment request."""


class RequestParser:
    """Reads the requests of one connection, one after the other. httptools calls the methods `on_…`."""

    __slots__ = (
        "_connections",
        "_fields",
        "_has_empty_upgrade",
        "_head_bytes",
        "_hosts",
        "_is_new",
        "_is_read",
        "_keeps_alive",
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
        """Header block, from the end of the request line on: size of the body, and whether to close the connection."""
        self.reset()

    def reset(self) -> None:
        """Forget a partly read request; the next byte begins a new one."""
        self._parser = HttpRequestParser(self)
        self._head_bytes = self._total_bytes = self._fields = self._hosts = 0
        self._connections = 0
        self._odd = self._is_read = self._is_new = self.closes = False
        self._keeps_alive = self._has_empty_upgrade = False
        self.url = self.head = self.body = self._last_host = b""

    @property
    def in_body(self) -> bool:
        """Whether a head was read whose body is incomplete."""
        return self._head_bytes > 0

    def has_new_head(self) -> bool:
        """Return whether a head was read since the last call, and its body is incomplete."""
        is_new, self._is_new = self._is_new, False
        return is_new and self._head_bytes > 0

    def read(self, data: bytes) -> int:
        """Read a request at the beginning of `data`; return its size in bytes, or 0 if it is incomplete.

        After a complete request `url`, `head`, `body` and `closes` (close the connection after the answer) are set.
        After an incomplete one the caller passes the same bytes again, followed by those received since.

        Raises:
            NotFastPath: it is not a plain payment request. Call `reset` before the next `read`.
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
        """Read a head; return its size in bytes, or 0 if it is incomplete."""
        if not data.startswith(_BEGINNING) and not _BEGINNING.startswith(data):
            raise NotFastPath
        end = data.find(b"\r\n\r\n", 0, self._max_head_bytes) + 4  # as in `head_limits`, which refuses a larger head
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
            is_usual = self._parse_head(data[:end])
            if is_usual and len(self._known) < _MOST_KNOWN and end - line <= _MOST_KNOWN_BYTES:
                self._known[data[line:end]] = self._total_bytes - end, self.closes
        self.head = data[:end]
        self._head_bytes = end
        self._is_new = True
        return end

    def _parse_head(self, head: bytes) -> bool:
        """Let httptools read a head, and check that it is plain; return whether its version is 1.1."""
        if head.count(b"\n") > MOST_LINES:
            raise NotFastPath
        self.head = head
        self._fields = self._hosts = self._connections = 0
        self._is_read = self.closes = self._keeps_alive = self._has_empty_upgrade = False
        self._total_bytes = len(head)
        try:
            self._parser.feed_data(head)
        except HttpParserUpgrade:  # it has Upgrade and `Connection: upgrade`
            pass
        except HttpParserError:
            raise NotFastPath from None
        # the number of lines is that of the fields, unless a line was folded or ended without CR
        if self._odd or self._hosts != 1 or self._fields + 2 != head.count(b"\n") or self._head_bytes:
            raise NotFastPath
        if self._total_bytes - len(head) > self._max_body_bytes:
            raise NotFastPath
        if self._has_empty_upgrade:  # this parser would now read another protocol; the body has a known size
            self._parser, self._is_read = HttpRequestParser(self), True
        if head.startswith(_VERSION, 4 + len(self.url)):
            return True
        if self._keeps_alive or not head.startswith(_OLD_VERSION, 4 + len(self.url)):
            raise NotFastPath
        self.closes = True
        return False

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
        if value != self._last_host:  # rarely true: a client sends the same Host each time
            self._odd |= not _HOST.fullmatch(value)
            self._last_host = value

    def _content_length(self, value: bytes) -> None:
        if self._total_bytes > len(self.head) or not _LENGTH.fullmatch(value):
            self._odd = True
        else:
            self._total_bytes += int(value)

    def _connection(self, value: bytes) -> None:
        self._connections += 1
        options = {option.strip(b" \t") for option in value.lower().split(b",")}
        self._odd |= not options <= _OPTIONS or self._connections > 1
        self.closes, self._keeps_alive = b"close" in options, b"keep-alive" in options

    def _upgrade(self, value: bytes) -> None:
        self._has_empty_upgrade = True
        self._odd |= bool(value)

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
    b"upgrade": RequestParser._upgrade,  # noqa: SLF001
}
