"""A whole paychan on this machine: the real signer process and the real server process, as one small object."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from paychan.running import Running, read_running
from tests.lib.node import Node

_PATIENCE_SECONDS = 90.0

SIGNER = """
network = "test"
debug = true
state_dir = "{state}"
[key]
mode = "debug"
[settlement]
destination_address = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"
[policy]
value_per_hour_sat = 0
"""

SERVER = """
network = "test"
debug = true
state_dir = "{state}"
[chain]
backend = "debug"
[http]
port = 0
[management]
port = 0
"""

DEBUG_SERVER_KEY = "0225b3aaf58992a8cc909522c2ec859ef218fd29fda0a6723cfb4e0529f80cc8f3"
"""Public key of the debug signer (RBPCP §9.1)."""


REGTEST_SIGNER = """
network = "regtest"
state_dir = "{state}"
[key]
mode = "hardened"
create_if_missing = true
[policy]
"""

REGTEST_SERVER = """
network = "regtest"
state_dir = "{state}"
[chain]
backend = "bitcoind"
url = "{url}"
credentials_file = "{credentials}"
stale_tip_minutes = 0
[open]
min_confirmations = 1
[settlement]
confirmations = 2
[watcher]
interval_seconds = 0.5
[http]
port = 0
[management]
port = 0
"""


class Daemon:
    """A console script that runs in the background, with its output in a file."""

    def __init__(
        self, log: Path, command: str, *arguments: str, limits: dict[int, int] | None = None, **environment: str
    ) -> None:
        """`limits` are resource limits of the process, soft and hard."""
        self.log = log
        program = Path(sys.executable).parent / command
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [program, *arguments],
                stdout=out,
                stderr=out,
                env={**os.environ, "PORT": "", **environment},
                preexec_fn=partial(_limit, limits) if limits else None,  # noqa: PLW1509 - it makes one system call
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(_PATIENCE_SECONDS)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def _limit(limits: dict[int, int]) -> None:
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


class System:
    """Signer and server with their own state directory; extra TOML is appended to the server's settings.

    With a `node` they use that node's regtest chain, otherwise debug mode. `sections={"http": "idle_seconds = 1"}`
    changes a setting of a table that `SERVER` already has.
    """

    def __init__(
        self,
        directory: Path,
        extra: str = "",
        sections: dict[str, str] | None = None,
        node: Node | None = None,
        limits: dict[int, int] | None = None,
    ) -> None:
        """`limits` are resource limits of the server process."""
        self.limits = limits
        self.directory = directory
        self.state = directory / "state"
        directory.mkdir(parents=True, exist_ok=True)
        signer, text = SIGNER, SERVER.format(state=self.state)
        if node is not None:
            signer = REGTEST_SIGNER
            text = REGTEST_SERVER.format(state=self.state, url=node.url, credentials=node.credentials)
        for name, lines in (sections or {}).items():
            text = (
                text.replace(f"[{name}]\n", f"[{name}]\n{lines}\n")
                if f"[{name}]" in text
                else text + f"[{name}]\n{lines}\n"
            )
        # The signer checks the server's fees against its own limits, so a test that changes one limit changes both.
        for limit in re.findall(r"^(?:max_fee_percent|max_fee_sat_per_vb) = \d+", text, re.MULTILINE):
            signer = signer.replace("[policy]\n", f"[policy]\n{limit}\n")
        self.server_file = directory / "server.toml"
        self.signer_file = directory / "signer.toml"
        self.server_file.write_text(text + extra)
        self.signer_file.write_text(signer.format(state=self.state))
        self.signer: Daemon | None = None
        self.server: Daemon | None = None
        self.running: Running | None = None

    def __enter__(self) -> Self:
        self.start_signer()
        try:
            self.start_server()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for daemon in (self.server, self.signer):
            if daemon is not None and daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGCONT)
                daemon.stop()
        if kind is not None:
            for daemon in (self.signer, self.server):
                print(f"--- {daemon.log} ---\n{daemon.text()}" if daemon else "never started")

    def __repr__(self) -> str:
        """Name the log files; pytest shows this text above a failed test."""
        return f"System({str(self.directory)!r})"

    @property
    def url(self) -> str:
        assert self.running is not None
        return self.running.url

    @property
    def management_url(self) -> str:
        assert self.running is not None
        return self.running.management_url

    @property
    def token(self) -> str:
        return (self.state / "management.token").read_text()

    def start_signer(self) -> None:
        self.signer = Daemon(self.directory / "signer.log", "paychan-signer", str(self.signer_file))

    def start_server(self) -> None:
        """Start the server and wait until it answers."""
        self.server = Daemon(
            self.directory / "server.log", "paychan", "serve", str(self.server_file), limits=self.limits
        )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            running = read_running(self.state)
            if running is not None and running.pid == self.server.process.pid:
                self.running = running
                return
            if self.server.process.poll() is not None:
                break
            time.sleep(0.02)
        msg = f"server did not start (exit status {self.server.process.poll()}):\n{self.server.text()}"
        raise AssertionError(msg)

    def kill_server(self) -> None:
        """Kill the server, the nearest a process comes to a power cut."""
        assert self.server is not None
        self.server.stop(signal.SIGKILL)

    def restart_server(self) -> None:
        self.kill_server()
        self.start_server()

    def manage(self, method: str, path: str) -> httpx.Response:
        """Send a request to the management listener, with the token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.request(method, self.management_url + path, headers=headers, timeout=30, verify=False)

    def channel(self, outpoint: Any) -> dict[str, Any]:
        """Return the operator's view of a channel."""
        txid, vout = str(outpoint).split(":")
        answer: dict[str, Any] = self.manage("GET", f"/channels/{txid}/{vout}").json()
        return answer


# --- deaths: kill -9, and the start after it --------------------------------------------------------------------------


@contextmanager
def dead_server(system: System, node: Node) -> Iterator[None]:
    system.kill_server()
    yield
    system.start_server()


@contextmanager
def dead_signer(system: System, node: Node) -> Iterator[None]:
    assert system.signer is not None
    system.signer.stop(signal.SIGKILL)
    yield
    system.start_signer()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while "absent" in system.manage("GET", "/health").json()["signer"]:
        assert time.monotonic() < deadline, system.signer.text()
        time.sleep(0.02)


_KEPT_BLOCKS = 64


def write_chain(node: Node) -> None:
    """Make the node write all its blocks, by a request for its outputs, so that `dead_node` loses only newer ones."""
    node.rpc("gettxoutsetinfo", "none")


@contextmanager
def dead_node(system: System, node: Node) -> Iterator[None]:
    """Kill a node: it loses its mempool and all blocks that it had not written; its peers would send both again."""
    height = node.height
    first = max(1, height - _KEPT_BLOCKS)
    blocks = [node.rpc("getblock", node.rpc("getblockhash", each), 0) for each in range(first, height + 1)]
    node.kill()
    yield
    node.start()
    assert node.height >= first - 1, "call write_chain more often"
    for block in blocks[node.height + 1 - first :]:
        node.rpc("submitblock", block)
    write_chain(node)
