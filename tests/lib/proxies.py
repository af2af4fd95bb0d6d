"""Real proxies in front of a server: nginx, Caddy and haproxy, with the files of config/deploy or a test's own lines."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import pytest

from paychan.api.budgets.head_limits import size_of_body, size_of_head
from paychan.api.fast.request_parser import NotFastPath, RequestParser
from tests.lib import background

DEPLOY = Path(__file__).parents[2] / "config" / "deploy"

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paychan" / "proxies"
_PLACES = (_CACHE / "usr/sbin", _CACHE / "usr/bin", Path("/usr/sbin"), Path("/usr/bin"), Path("/usr/local/bin"))
_PATIENCE_SECONDS = 30.0
_MOST_BYTES = 8192

COPIED = """
    server {{
        listen {port};
        listen [::1]:{port};
        location / {{
            proxy_pass http://{upstream};
            proxy_http_version 1.1;
            proxy_read_timeout {seconds}s;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
            proxy_set_header Host $http_host;
            proxy_set_header X-Real-IP $remote_addr;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            {scheme}
        }}
    }}
"""
"""The block for WebSockets of nginx.org and of most tutorials; `Connection: upgrade` on all requests."""

PLAIN = """
    server {{
        listen {port};
        location / {{
            proxy_pass http://{upstream};
            proxy_set_header Host $http_host;
        }}
    }}
"""
"""HTTP/1.0 to the server, as nginx does by default."""

NGINX_FRAME = """
daemon off;
pid {directory}/nginx.pid;
error_log stderr;
{user}
worker_processes 1;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/temp;
    fastcgi_temp_path {directory}/temp;
    uwsgi_temp_path {directory}/temp;
    scgi_temp_path {directory}/temp;
{lines}
}}
"""

CADDY_FRAME = """
{{
	admin off
	auto_https disable_redirects
	skip_install_trust
}}
{lines}
"""


def find_proxy(name: str) -> str | None:
    """Find a program: the one that tests/fetch-proxies unpacked, or an installed one."""
    return shutil.which(name, path=os.pathsep.join(map(str, _PLACES)))


class Proxy:
    """One running proxy. `lines` are its configuration, as an operator would write it; see the functions below."""

    def __init__(self, program: str, directory: Path, lines: str, url: str) -> None:
        self.url, self.directory = url, directory
        found = find_proxy(program)
        if found is None:
            pytest.skip(f"no {program}: run tests/fetch-proxies")
        directory.mkdir(parents=True)
        file = directory / f"{program}.conf"
        if program == "nginx":
            user = "user root;" if os.geteuid() == 0 else ""
            lines = NGINX_FRAME.format(directory=directory, lines=lines, user=user)
        elif program == "caddy":
            lines = CADDY_FRAME.format(lines=lines)
        file.write_text(lines)
        self._command = {
            "nginx": [found, "-e", "stderr", "-c", str(file), "-p", str(directory)],
            "caddy": [found, "run", "--adapter", "caddyfile", "--config", str(file)],
            "haproxy": [found, "-db", "-f", str(file)],
        }[program]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it, and wait until it listens."""
        where, log = urlsplit(self.url), self.directory / "log"
        home = {
            "HOME": str(self.directory),
            "XDG_DATA_HOME": str(self.directory),
            "XDG_CONFIG_HOME": str(self.directory),
        }
        with log.open("wb") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=out, env={**os.environ, **home})
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with suppress(OSError), socket.create_connection((where.hostname, where.port), timeout=1):
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise AssertionError(log.read_text())
            time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        if kind is not None:
            print((self.directory / "log").read_text())

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_PATIENCE_SECONDS)


def shipped(name: str, certificate: Path, port: int, upstream: str, seconds: int = 60) -> str:
    """Return a file of config/deploy for a test: its port, certificate and upstream, and `seconds` instead of 60.

    `certificate` has the key beside it, as `.key`. The rest is as shipped.
    """
    text = (DEPLOY / name).read_text().replace("127.0.0.1:8000", upstream).replace("60s", f"{seconds}s")
    logs = certificate.parent
    changes = {
        "nginx.conf": [
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("listen [::]:443 ssl", f"listen [::1]:{port} ssl"),
            ("/etc/letsencrypt/live/pay.example/fullchain.pem", str(certificate)),
            ("/etc/letsencrypt/live/pay.example/privkey.pem", str(certificate.with_suffix(".key"))),
            ("/var/log/nginx/", f"{logs}/"),
        ],
        "Caddyfile": [
            ("\npay.example {", f"\nhttps://localhost:{port} {{\n\ttls {certificate} {certificate.with_suffix('.key')}")
        ],
        "haproxy.cfg": [
            ("bind :443", f"bind 127.0.0.1:{port}"),
            ("bind :::443", f"bind ::1:{port}"),
            ("/etc/haproxy/pay.example.pem", str(certificate.with_suffix(".both"))),
        ],
    }[name]
    for old, new in changes:
        assert old in text, f"{old} is not in {name}"
        text = text.replace(old, new)
    return text


class Recorder:
    """Forwards connections to a server, and keeps the bytes that each sent."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._to = where.hostname, where.port
        self.sent: list[bytearray] = []
        self._tasks = set[asyncio.Task[None]]()

    def __enter__(self) -> Self:
        self._server = background.run(asyncio.start_server, self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        background.run(self._close)

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = bytearray()
        self.sent.append(sent)
        up_reader, up_writer = await asyncio.open_connection(*self._to)
        back = asyncio.create_task(_copy(up_reader, writer, None))
        self._tasks.update((back, asyncio.current_task()))  # type: ignore[arg-type] # a task runs this
        try:
            with suppress(asyncio.CancelledError):
                await _copy(reader, up_writer, sent)
                await back
        finally:
            back.cancel()
            writer.close()
            up_writer.close()


def payments(sent: bytes) -> tuple[int, int]:
    """Count the payments that one connection sent: those that the fast path reads, and all."""
    fast = count = 0
    while size := size_of_head(sent, _MOST_BYTES):
        size += size_of_body(sent[:size])
        if sent.startswith(b"PUT /v"):
            count += 1
            with suppress(NotFastPath):
                fast += RequestParser(_MOST_BYTES, _MOST_BYTES).read(sent[:size]) == size
        sent = sent[size:]
    return fast, count


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray | None) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            if record is not None:
                record += data
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
