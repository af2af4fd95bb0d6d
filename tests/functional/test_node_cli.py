"""`paychan node`: from an empty directory to a funded channel address, on a local node."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paychan.chain.base import Funding, Tip
from paychan.chain.bitcoind.chain import BitcoindChain
from paychan.cli.node import find_bitcoind
from paychan.protocol.types import Network, OutPoint, Sat
from tests.lib.channels import Payer
from tests.lib.ports import free_port

PATIENCE_SECONDS = 90.0
PAYER = Payer("node cli")
COMMAND = [sys.executable, "-c", "from paychan.cli.node import app; app(prog_name='paychan node')"]


class Running:
    """`paychan node start` in the background, in its own directory and on its own ports."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory.with_suffix(".out")
        self.rpc_port, self.zmq_port = free_port(), free_port()
        self.start()

    def start(self) -> None:
        ports = ["--rpc-port", str(self.rpc_port), "--zmq-port", str(self.zmq_port)]
        command = [*COMMAND, "start", "--dir", str(self.directory), *ports]
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"COLUMNS": "200"})
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "Mine" not in self.text and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "Mine" in self.text, self.text

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def cookie(self) -> Path:
        return self.directory / "regtest" / ".cookie"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.rpc_port}"

    @property
    def tip(self) -> Tip:
        async def ask() -> Tip:
            chain = BitcoindChain(self.url, Network.REGTEST, credentials=self.cookie)
            try:
                return await chain.tip()
            finally:
                await chain.close()

        return asyncio.run(ask())

    def run_command(self, *words: object) -> subprocess.CompletedProcess[str]:
        return run_command(*words, "--dir", self.directory)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    if find_bitcoind() is None:
        pytest.skip("no bitcoind: run tests/fetch-bitcoind, or set PAYCHAN_BITCOIND")
    running = Running(tmp_path / "node")
    yield running
    running.end()


def run_command(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})


async def test_from_nothing_to_funding(running: Running) -> None:
    """The started node is fit for the server, pays to a channel's address, and confirms it on request."""
    for shown in (running.url, str(running.cookie), f"tcp://127.0.0.1:{running.zmq_port}", "2000.00000000 BTC"):
        assert shown in running.text
        assert shown in running.run_command("info").stdout
    chain = BitcoindChain(running.url, Network.REGTEST, credentials=running.cookie)
    await chain.check()
    address = PAYER.terms.funding_address(Network.REGTEST)
    funded = running.run_command("fund", address, 123_456_789)
    assert funded.returncode == 0
    txid, vout = re.match(r"([0-9a-f]{64}):(\d+)\n", funded.stdout).groups()
    outpoint = OutPoint.parse(txid, int(vout))
    assert await chain.funding(PAYER.terms) == (Funding(outpoint, Sat(123_456_789), 0),)
    assert running.run_command("mine", 3).stdout == "height 143\n"
    assert await chain.funding(PAYER.terms) == (Funding(outpoint, Sat(123_456_789), 3),)
    await chain.close()


def test_stop_and_start(running: Running) -> None:
    """Stopping ends both processes; the next start continues the same chain, one block higher."""
    assert running.run_command("stop").returncode == 0
    assert running.process.wait(PATIENCE_SECONDS) == 0
    refused = running.run_command("mine")
    assert (refused.returncode, "no node runs in" in refused.stderr) == (1, True)
    running.start()
    assert "Height  141" in running.text


def test_time_passes(running: Running) -> None:
    """The median time passes the requested hours, repeatedly; blocks can be mined then, also after a restart."""
    begun = int(time.time())
    for hours, all_hours in ((1, 1), (170, 171)):
        assert re.fullmatch(r"height 1\d\d, median time .+\n", running.run_command("pass", hours).stdout)
        assert running.tip.median_time > begun + all_hours * 3600
    assert running.run_command("mine", 30).returncode == 0
    assert running.end() == 0

    running.start()
    assert re.search(r"Clock +stands at .*in 7 d 3 h", running.text)
    assert running.run_command("mine", 30).returncode == 0
    assert running.run_command("pass", 10).returncode == 0
    assert running.tip.median_time > begun + 181 * 3600


def test_time_continues_once_the_clock_has_caught_up(running: Running) -> None:
    """A clock that was set ahead stands still only until the machine's clock reaches it."""
    ahead = int(time.time()) + 3600
    for unix_time, stands in ((ahead, True), (ahead - 7200, False)):
        (running.directory / "clock").write_text(f"{unix_time}\n")
        assert ("stands at" in running.run_command("info").stdout) == stands
        running.run_command("mine", 1)
        assert (running.tip.time == ahead) == stands


def test_interrupt(running: Running) -> None:
    """Ctrl-C ends the node together with the command."""
    assert running.end(signal.SIGINT) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.rpc_port), timeout=5)


def test_second_start(running: Running) -> None:
    """A second start in the same directory is refused, and one on the same port says so; the first is not affected."""
    second = running.run_command("start", "--rpc-port", free_port())
    assert (second.returncode, "a node is already running in" in second.stderr) == (1, True)
    elsewhere = ["--dir", running.directory.with_name("other"), "--zmq-port", free_port()]
    third = run_command("start", "--rpc-port", running.rpc_port, *elsewhere)
    assert third.returncode == 1
    assert re.search(
        rf"port {running.rpc_port} is held by process \d+ \(.*bitcoind.*choose another .* --rpc-port", third.stderr
    )
    assert running.run_command("info").returncode == 0


def test_refusals_of_the_node(running: Running) -> None:
    """The command shows the node's own message if its wallet refuses."""
    wrong = running.run_command("fund", "mouse", 1000)
    assert (wrong.returncode, wrong.stderr) == (1, "paychan: Invalid Bitcoin address: mouse\n")
    poor = running.run_command("fund", PAYER.terms.funding_address(Network.REGTEST), 300_000_000_000)
    assert (poor.returncode, poor.stderr) == (1, "paychan: Insufficient funds\n")


def test_a_missing_program_or_directory(tmp_path: Path) -> None:
    """Without the program, or without a directory, the command says what to do."""
    no_program = run_command("start", "--bitcoind", tmp_path / "bitcoind", "--dir", tmp_path)
    assert (no_program.returncode, "tests/fetch-bitcoind" in no_program.stderr) == (2, True)
    for command in (["mine"], ["fund", "address", "1"], ["pass", "1"], ["info"], ["stop"]):
        result = run_command(*command, "--dir", tmp_path)
        assert (result.returncode, "paychan node start" in result.stderr) == (2, True)


@pytest.mark.parametrize("found", ["environment", "path", "cache"])
def test_where_the_program_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """The environment comes before PATH, and PATH before the directory of tests/fetch-bitcoind."""
    places = {name: tmp_path / name / "paychan/bitcoind/bitcoind" for name in ("environment", "path", "cache")}
    for name in list(places)[list(places).index(found) :]:
        places[name].parent.mkdir(parents=True)
        places[name].touch(mode=0o755)
    monkeypatch.delenv("PAYCHAN_BITCOIND", raising=False)
    if found == "environment":
        monkeypatch.setenv("PAYCHAN_BITCOIND", str(places["environment"]))
    monkeypatch.setenv("PATH", str(places["path"].parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_bitcoind() == places[found]
