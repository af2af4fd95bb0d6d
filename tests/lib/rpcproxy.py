"""A proxy in front of a real bitcoind, which records the calls and can delay one of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import httpx

from tests.lib.node import Node

_PATIENCE_SECONDS = 30.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, serve: Callable[[BaseHTTPRequestHandler], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.serve = serve


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        self.server.serve(self)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class RpcProxy:
    """Forwards every request; `calls` are the methods so far, in order."""

    def __init__(self, node: Node) -> None:
        self.calls: list[str] = []
        self._node = node
        self._client = httpx.Client(trust_env=False, timeout=60, verify=False)
        self._hold_next = False
        self._held: dict[str, threading.Event] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        """Methods to answer with an error: HTTP status and JSON."""
        self._waits, self._go_on = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(self._serve)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._client.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def one_waits(self) -> Iterator[None]:
        """Delay the next call until the end of the block; calls beside it are answered at once.

        A client that sends its calls one after another, such as the server's watcher, sends no further call meanwhile.
        """
        self._waits.clear()
        self._go_on.clear()
        self._hold_next = True
        assert self._waits.wait(_PATIENCE_SECONDS), "no call arrived"
        try:
            yield
        finally:
            self._go_on.set()

    @contextmanager
    def held(self, method: str) -> Iterator[None]:
        """Delay calls of a method until the end of the block; all other calls are answered."""
        self._held[method] = threading.Event()
        try:
            yield
        finally:
            self._held.pop(method).set()

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        asked = json.loads(body)
        methods = {each["method"] for each in (asked if isinstance(asked, list) else [asked])}
        refusal = next((self.refused[method] for method in methods if method in self.refused), None)
        with self._lock:
            self.calls += [each["method"] for each in (asked if isinstance(asked, list) else [asked])]
            held, self._hold_next = self._hold_next, False
        if held:
            self._waits.set()
            self._go_on.wait(_PATIENCE_SECONDS)
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
        for method in methods & self._held.keys():
            self._held[method].wait(_PATIENCE_SECONDS)
        if refusal is None:
            answer = self._client.post(self._node.url + request.path, content=body, headers=headers)
        else:
            answer = httpx.Response(refusal[0], content=refusal[1], headers={"Content-Type": "application/json"})
        request.send_response(answer.status_code)
        request.send_header("Content-Type", answer.headers["Content-Type"])
        request.send_header("Content-Length", str(len(answer.content)))
        request.end_headers()
        request.wfile.write(answer.content)
