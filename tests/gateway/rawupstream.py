"""An upstream that keeps the bytes of each connection, reads them by strict rules of its own, and answers by a script.

It is not aiohttp, so that the gateway and its judge do not share a parser.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable

Answer = Callable[[socket.socket], None]
"""Writes an answer to a request; a connection that it closes ends."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

_HEAD = re.compile(
    rb"(?P<method>[A-Z]+) (?P<target>/[\x21-\x7e]*) HTTP/1\.1\r\n(?P<fields>(?:[!-9;-~]+: ?[\x20-\x7e]*\r\n)*)\r\n"
)
_SIZE = re.compile(rb"(?im)^content-length: ?([0-9]+)\r$")
_CHUNKED = re.compile(rb"(?im)^transfer-encoding: ?chunked\r$")
_CHUNK = re.compile(rb"([0-9a-f]+)\r\n")


class Confused(Exception):
    """The bytes are no plain sequence of requests."""


class RawUpstream:
    """Listens on a thread. `targets` are method and target of each request, `confused` what it could not read."""

    def __init__(self) -> None:
        self.targets: list[tuple[str, str]] = []
        self.heads: list[bytes] = []
        self.confused: list[str] = []
        self.answer: Answer = lambda connection: connection.sendall(OK)
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Close everything, also the connections that an answer left hanging."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        reader = _Reader(connection)
        try:
            while (head := reader.head()) is not None:
                match = _HEAD.fullmatch(head)
                if match is None:
                    self.confused.append(repr(head[:200]))
                    return
                self.heads.append(head)
                self.targets.append((match["method"].decode(), match["target"].decode()))
                reader.skip_body(match["fields"])
                self.answer(connection)
        except Confused as error:
            self.confused.append(repr(error))
        except OSError:
            pass
        finally:
            connection.close()
            self._open.discard(connection)


class _Reader:
    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest = connection, b""

    def _more(self) -> bool:
        got = self._connection.recv(65536)
        self._rest += got
        return bool(got)

    def head(self) -> bytes | None:
        """Return a head; None: the connection ended between requests, or within a head."""
        while b"\r\n\r\n" not in self._rest:
            if not self._more():
                return None
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def skip_body(self, fields: bytes) -> None:
        sizes, is_chunked = _SIZE.findall(fields), bool(_CHUNKED.search(fields))
        if len(sizes) + is_chunked > 1:
            raise Confused(fields)
        if sizes:
            self._skip(int(sizes[0]))
        while is_chunked:
            while (size := _CHUNK.match(self._rest)) is None:
                if len(self._rest) > 20:
                    raise Confused(self._rest[:50])
                if not self._more():
                    return
            self._rest = self._rest[size.end() :]
            self._skip(int(size[1], 16) + 2)
            is_chunked = int(size[1], 16) > 0

    def _skip(self, size: int) -> None:
        while len(self._rest) < size:
            if not self._more():
                return
        self._rest = self._rest[size:]
