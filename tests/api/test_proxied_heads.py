"""The heads that proxies write to payments are plain: the fast path reads them."""

from __future__ import annotations

import pytest

from paychan.api.fast.request_parser import NotFastPath, RequestParser

LINE = b"PUT /v2/channels/" + b"0" * 64 + b"/0?secret=" + b"1" * 64 + b" HTTP/1.1\r\n"

HEADS = {
    "nginx, with the block for WebSockets": b"Upgrade: \r\nConnection: upgrade\r\nHost: pay.example\r\n",
    "nginx leaves out an empty Upgrade": b"Connection: upgrade\r\nHost: pay.example\r\n",
    "options in a list": b"Host: pay.example\r\nConnection: keep-alive, Upgrade\r\n",
    "a name with an underscore": b"Host: pay_1.lan:8000\r\n",
    "lower case, as haproxy writes it": b"host: pay.example\r\nx-forwarded-proto: https\r\n",
    "a forwarded IPv6 address": b"Host: [::1]:8000\r\nX-Forwarded-For: 2001:db8::1\r\n",
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("body", [b"", b'{"change_value":1}'])
@pytest.mark.parametrize("old", [False, True])  # HTTP/1.0
def test_fault_36_heads_of_proxies_are_plain(kind: str, body: bytes, *, old: bool) -> None:
    """Each is read by the fast path, again on the same connection, and with a body that comes later."""
    line = LINE.replace(b"1.1", b"1.0") if old else LINE
    head = (
        line
        + HEADS[kind].replace(b"keep-alive", b"close" if old else b"keep-alive")
        + (b"Content-Length: %d\r\n" % len(body) if body else b"")
        + b"\r\n"
    )
    reader = RequestParser(8192, 4096)
    for _ in range(1 if old else 3):  # HTTP/1.0 ends the connection
        if body:
            assert reader.read(head) == 0
        assert reader.read(head + body + LINE) == len(head + body)
        assert (reader.body, reader.closes) == (body, old)


ODD = {
    "a protocol": b"Upgrade: h2c\r\nConnection: Upgrade\r\nHost: x\r\n",
    "an empty protocol and another": b"Upgrade:\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nHost: x\r\n",
    "another option": b"Connection: upgrade, TE\r\nHost: x\r\n",
    "an empty option": b"Connection: upgrade,\r\nHost: x\r\n",
}


@pytest.mark.parametrize("kind", ODD)
def test_fault_36_other_upgrades_are_not_plain(kind: str) -> None:
    """A head that asks for a protocol, or has an unknown option, is left to Tornado."""
    with pytest.raises(NotFastPath):
        RequestParser(8192, 4096).read(LINE + ODD[kind] + b"\r\n")


def test_the_versions_share_no_cached_lines() -> None:
    """The same header lines end a connection of HTTP/1.0 and keep one of HTTP/1.1."""
    reader = RequestParser(8192, 4096)
    for line, closes in ((LINE, False), (LINE.replace(b"1.1", b"1.0"), True), (LINE, False)):
        head = line + b"Host: x\r\n\r\n"
        assert reader.read(head) == len(head)
        assert reader.closes is closes
