"""A real proxy on this machine, which speaks HTTP (forwarding and CONNECT) and SOCKS5."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import Any, Self
from urllib.parse import urlsplit


class Relay:
    """Listens on a free port while in use as a context manager; `ways` are the kinds of requests that came."""

    def __init__(self) -> None:
        self.ways: list[str] = []
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    relay._serve(self.request)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def _serve(self, client: Any) -> None:
        first = client.recv(1)
        if first == b"\x05":
            self._socks(client)
        elif first:
            self._http(client, first)

    def _socks(self, client: Any) -> None:
        """Serve RFC 1928: no authentication, CONNECT to a name or an IPv4 address."""
        client.recv(ord(client.recv(1)))
        client.sendall(b"\x05\x00")
        kind = client.recv(4)[3]
        host = socket.inet_ntoa(client.recv(4)) if kind == 1 else client.recv(ord(client.recv(1))).decode()
        port = int.from_bytes(client.recv(2), "big")
        self.ways.append(f"SOCKS {'name' if kind == 3 else 'address'}")
        with socket.create_connection((host, port)) as server:
            client.sendall(b"\x05\x00\x00\x01" + bytes(6))
            self._pipe(client, server)

    def _http(self, client: Any, head: bytes) -> None:
        while b"\r\n\r\n" not in head:
            head += client.recv(65536)
        line, _, rest = head.partition(b"\r\n")
        method, target, version = line.decode().split()
        self.ways.append(method)
        parts = urlsplit(target if "://" in target else f"//{target}")
        with socket.create_connection((parts.hostname or "", parts.port or 80)) as server:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                path = f"{parts.path}?{parts.query}" if parts.query else parts.path
                rest = rest.replace(b"Connection: keep-alive", b"Connection: close")
                server.sendall(f"{method} {path} {version}\r\n".encode() + rest)
            self._pipe(client, server)

    @staticmethod
    def _pipe(client: Any, server: socket.socket) -> None:
        def back() -> None:
            with contextlib.suppress(OSError):
                while part := server.recv(65536):
                    client.sendall(part)
                client.shutdown(socket.SHUT_RDWR)

        backward = threading.Thread(target=back, daemon=True)
        backward.start()
        with contextlib.suppress(OSError):
            while part := client.recv(65536):
                server.sendall(part)
            server.shutdown(socket.SHUT_RDWR)
        backward.join()
