"""A real HTTP server in the role of the application that judges payments (RBPCP §13.1)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self


class Question(NamedTuple):
    """One request from the server."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    raw: bytes = b""

    @property
    def idempotency_key(self) -> str:
        return self.headers["Idempotency-Key"]


class Reply(NamedTuple):
    """The response to send; a status of 0 closes the connection instead."""

    status: int
    content: bytes
    headers: tuple[tuple[str, str], ...] = ()
    pause_seconds: float = 0.0
    """Pause between any two bytes of the content."""


def yes(data: str = "") -> Reply:
    return Reply(200, json.dumps({"resp_app_data": data, "resp_app_error": None}).encode())


def no(reason: str) -> Reply:
    return Reply(200, json.dumps({"resp_app_data": "", "resp_app_error": reason}).encode())


class Application:
    """Records the server's requests, and responds with the result of `answer`; a thread per request."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.events: list[Question] = []
        """The messages about channels, whatever their answer was."""
        self.answer_event: Callable[[Question], Reply] = lambda _: Reply(204, b"")
        self.answer: Callable[[Question], Reply] = lambda _: yes()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/app"

    @property
    def keys(self) -> list[str]:
        """The idempotency keys in the order of the requests."""
        return [question.idempotency_key for question in self.questions]

    def forget(self) -> None:
        """Start over: no requests recorded, and every payment is accepted."""
        self.questions.clear()
        self.events.clear()
        self.answer = lambda _: yes()
        self.answer_event = lambda _: Reply(204, b"")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        application = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                question = Question(self.path, dict(self.headers), json.loads(raw), raw)
                if self.path.endswith("/value_received"):
                    application.questions.append(question)
                    reply = application.answer(question)
                else:
                    application.events.append(question)
                    reply = application.answer_event(question)
                if not reply.status:
                    self.close_connection = True
                    return
                try:
                    self.send_response(reply.status)
                    for name, value in (*reply.headers, ("Content-Length", str(len(reply.content)))):
                        self.send_header(name, value)
                    self.end_headers()
                    self._send(reply)
                except ConnectionError:
                    self.close_connection = True  # the server closed the connection first

            def _send(self, reply: Reply) -> None:
                if not reply.pause_seconds:
                    self.wfile.write(reply.content)
                    return
                for byte in reply.content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.pause_seconds)

            def log_message(self, *args: Any) -> None:
                """Log nothing."""

        return Handler
