"""A real ElectrumX on top of a test's bitcoind, over TCP and TLS, with a self-signed certificate."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.lib.node import Node
from tests.lib.ports import free_ports
from tests.lib.system import Daemon

_PATIENCE_SECONDS = 90.0
_POLL_MILLISECONDS = "50"

_LAUNCH = """
from electrumx.cli.electrumx_server import main
from electrumx.server.daemon import Daemon
from electrumx.server.transport import PaddedRSTransport
PaddedRSTransport.WAIT_FOR_BUFFER_GROWTH_SECONDS = {hold_back_seconds}
Daemon.getmempoolinfo = lambda daemon: daemon._send_single("getmempoolinfo")
main()
"""
"""By default ElectrumX delays small answers by about a second, to pad packets to one size.

It also caches data of the node's mempool for a minute. The test's ElectrumX does neither by default.
"""


class ElectrumX:
    """Indexes a node that runs with `-txindex`. Its ports stay the same over restarts.

    It notices a reorg only once the new branch is longer than the old one.
    """

    def __init__(self, node: Node, directory: Path, hold_back_seconds: float = 0.0) -> None:
        if find_spec("electrumx") is None:
            pytest.skip("no ElectrumX: pip install 'e-x<2'")
        self.node = node
        self.directory = directory
        self.certificate = directory / "server.crt"
        self.tcp_port, self.tls_port = free_ports(2)
        self.daemon: Daemon | None = None
        self._program = _LAUNCH.format(hold_back_seconds=hold_back_seconds)

    @property
    def tcp_url(self) -> str:
        return f"tcp://127.0.0.1:{self.tcp_port}"

    @property
    def tls_url(self) -> str:
        return f"ssl://127.0.0.1:{self.tls_port}"

    def __enter__(self) -> Self:
        (self.directory / "db").mkdir(parents=True, exist_ok=True)
        make_certificate(self.certificate)
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start, and wait until it has indexed the node's whole chain."""
        login = self.node.credentials.read_text().strip()
        self.daemon = Daemon(
            self.directory / "electrumx.log",
            "python",
            "-c",
            self._program,
            COIN="Bitcoin",
            NET="regtest",
            DB_DIRECTORY=str(self.directory / "db"),
            DAEMON_URL=self.node.url.replace("//", f"//{login}@"),
            SERVICES=f"{self.tcp_url},{self.tls_url}",
            SSL_CERTFILE=str(self.certificate),
            SSL_KEYFILE=str(self.certificate.with_suffix(".key")),
            PEER_DISCOVERY="off",
            PEER_ANNOUNCE="",
            COST_SOFT_LIMIT="0",
            COST_HARD_LIMIT="0",
            CACHE_MB="16",
            DAEMON_POLL_INTERVAL_BLOCKS=_POLL_MILLISECONDS,
            DAEMON_POLL_INTERVAL_MEMPOOL=_POLL_MILLISECONDS,
            ALLOW_ROOT="1",
        )
        self.wait_until_synced()

    def wait_until_synced(self) -> None:
        """Wait until its tip is the node's tip."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            assert self.daemon is not None
            if self.daemon.process.poll() is not None:
                break
            if self._header(self.node.height) == self.node.rpc("getblockheader", self.node.best, False):
                return
            time.sleep(0.02)
        msg = f"ElectrumX has another tip than its node:\n{self.daemon.text()}"
        raise AssertionError(msg)

    def kill(self) -> None:
        """Kill it, also if SIGSTOP has stopped it."""
        if self.daemon is not None:
            self.daemon.stop(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it (SIGSTOP): connections stay open, and requests get no answer."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.daemon is not None
        self.daemon.process.send_signal(number)

    def _header(self, height: int) -> Any:
        """Request a header as a client would; None without an answer, or if there is no such block."""
        try:
            with socket.create_connection(("127.0.0.1", self.tcp_port), timeout=5) as connection:
                stream = connection.makefile("rwb")
                for number, (method, *params) in enumerate(
                    (("server.version", "test", "1.4"), ("blockchain.block.header", height))
                ):
                    stream.write(json.dumps({"id": number, "method": method, "params": params}).encode() + b"\n")
                    stream.flush()
                    answer = json.loads(stream.readline())
        except (OSError, ValueError):
            return None
        return answer.get("result")


def make_certificate(path: Path) -> None:
    """Write a self-signed certificate, as Electrum servers have, and beside it its key as `.key`."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=electrum"
    subprocess.run(
        [*command.split(), "-keyout", path.with_suffix(".key"), "-out", path], check=True, capture_output=True
    )
