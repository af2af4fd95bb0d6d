"""The payer's commands on a real chain: fund, wait, open, pay, close; and the refund without a server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from paychan.protocol.types import OutPoint
from tests.lib.customer import wait_for
from tests.lib.electrumx import ElectrumX
from tests.lib.node import Node
from tests.lib.system import System

FUNDING_SAT = 600_000
LIFE_HOURS = 40
_PATIENCE_SECONDS = 90
_PROGRAM = Path(sys.executable).parent / "paychan"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", "-txindex=1") as node:
        yield node


@pytest.fixture
def system(tmp_path: Path, node: Node) -> Iterator[System]:
    with System(tmp_path / "system", node=node) as system:
        yield system


@pytest.fixture
def payer(tmp_path: Path, system: System, node: Node) -> Iterator[PayerAtTerminal]:
    payer = PayerAtTerminal(tmp_path, system, node)
    yield payer
    payer.leave()


class PayerAtTerminal:
    """A payer with a wallet directory who runs `paychan channel` commands."""

    def __init__(self, directory: Path, system: System, node: Node) -> None:
        self.directory, self.system, self.node = directory, system, node
        self.wallet = directory / "wallet"
        self.own_node = ["--node", node.url, "--credentials", str(node.credentials)]
        self._running: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, "PAYCHAN_WALLET": str(self.wallet), "COLUMNS": "200"}

    def run(self, command: str, *words: object, status: int = 0) -> str:
        """Run a command to its end, and return its output."""
        done = subprocess.run(
            [_PROGRAM, "channel", command, *map(str, words)],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, command: str, *words: object) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a command that keeps running; return its process and its output file."""
        log = self.directory / f"{command}.out"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [_PROGRAM, "channel", command, *map(str, words)],
                env=self._environment,
                stdout=file,
                stderr=file,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here; a background shell has SIGINT ignored
            )
        self._running.append(process)
        return process, log

    def leave(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()

    def new(self, *options: str) -> tuple[subprocess.Popen[bytes], Path, str]:
        """Start `paychan channel new`, which waits; return its process, its output and the channel's name."""
        process, log = self.start(
            "new", self.system.url, "--network", "regtest", "--hours", LIFE_HOURS, "--amount", FUNDING_SAT, *options
        )
        wait_for(lambda: "Ctrl-C stops waiting" in log.read_text(errors="replace"), "invitation")
        return process, log, next(self.wallet.glob("[!.]*.json")).stem

    def opened(self, *options: str) -> str:
        """Return a channel that opened by itself after its funding."""
        process, log, name = self.new(*options)
        self.fund(name)
        self.node.mine()
        assert process.wait(_PATIENCE_SECONDS) == 0, log.read_text()
        return name

    def fund(self, name: str, sat: int = FUNDING_SAT) -> OutPoint:
        return self.node.fund(self.record(name)["funding_address"], sat)

    def record(self, name: str) -> Any:
        return json.loads((self.wallet / f"{name}.json").read_text())

    def seen(self, name: str, source: list[str]) -> Any:
        """Return the JSON of `watch --once` for a channel."""
        (sight,) = json.loads(self.run("watch", name, "--once", "--json", *source))
        return sight


@pytest.mark.parametrize("version", [[], ["--v1"]], ids=["v2", "v1"])
def test_a_whole_channel_by_the_payers_commands(payer: PayerAtTerminal, node: Node, version: list[str]) -> None:
    """`new` waits, saves the refund before the block, and opens by itself; pay and close; the settlement confirms."""
    process, log, name = payer.new(*version)
    address = payer.record(name)["funding_address"]
    assert re.search(rf"^{address}\nbitcoin:{address}\?amount=0.00600000$", log.read_text(), re.MULTILINE)
    assert "█▀▀▀▀▀█" in log.read_text()
    outpoint = payer.fund(name)
    wait_for(lambda: payer.record(name)["funding_outpoint"] == str(outpoint), "funding seen")
    held = payer.record(name)
    assert (held["state"], held["signed_sat"], len(held["refunds"])) == ("new", None, 1)
    assert held["funding_source"] == "transaction"
    assert process.poll() is None
    node.mine()
    assert process.wait(_PATIENCE_SECONDS) == 0, log.read_text()
    assert f"paychan channel pay {name} 1000" in log.read_text()
    assert f"Funded by {outpoint}: 600,000 sat: checked with the funding transaction" in log.read_text()
    assert "not checked" not in log.read_text() + payer.run("status", name)

    payer.run("pay", name, 10, "--times", 5)
    assert "Settled by" in payer.run("close", name)
    txid = payer.record(name)["settlement_txid"]
    assert node.rpc("getrawmempool") == [txid]
    node.mine(3)
    change = node.rpc("gettxout", txid, 0)
    assert change["value"] * 100_000_000 == FUNDING_SAT - payer.record(name)["open_price_sat"] - 50
    assert payer.seen(name, payer.own_node)["spent_by"] == txid


@pytest.mark.parametrize("version", [[], ["--v1"]], ids=["v2", "v1"])
def test_open_continues_after_ctrl_c(payer: PayerAtTerminal, node: Node, version: list[str]) -> None:
    """Interrupted while waiting, the channel stays; `open` finds an output that is large enough, and no smaller one."""
    process, log, name = payer.new(*version)
    process.send_signal(signal.SIGINT)
    assert process.wait(_PATIENCE_SECONDS) == 130
    assert f"paychan channel open {name}" in log.read_text()

    assert "got nothing" in payer.run("open", name, "--no-wait", status=1)
    payer.fund(name, FUNDING_SAT - 1)
    node.mine()
    assert f"got {FUNDING_SAT - 1:,} sat" in payer.run("open", name, "--no-wait", status=1)
    outpoint = payer.fund(name)
    node.mine()
    assert f"Funded by {outpoint}" in payer.run("open", name)
    assert payer.record(name)["state"] == "open"


@pytest.mark.parametrize("version", [[], ["--v1"]], ids=["v2", "v1"])
def test_the_refund_after_the_server_vanished(
    payer: PayerAtTerminal, system: System, node: Node, version: list[str]
) -> None:
    """Too early by median time past, it says so; after that time, the refund is published without the server."""
    name = payer.opened(*version)
    system.kill_server()
    expiry = payer.record(name)["expiry"]
    assert "too early" in payer.run("refund", name, "--publish", *payer.own_node, status=1)
    node.set_mock_time(expiry + 3600)
    node.mine()
    assert node.median_time <= expiry
    assert "too early" in payer.run("refund", name, "--publish", *payer.own_node, status=1)
    assert "unspent" in payer.run("watch", "--once", *payer.own_node)
    assert node.rpc("getrawmempool") == []
    node.pass_median_time(expiry)

    published = json.loads(payer.run("refund", name, "--publish", "--fee-rate", 5, "--json", *payer.own_node))
    assert node.rpc("getrawmempool") == [published["txid"]]
    signature_sizes_differ_by = 2
    assert published["fee_sat"] >= 5 * (
        node.rpc("getmempoolentry", published["txid"])["vsize"] - signature_sizes_differ_by
    )
    again = json.loads(payer.run("refund", name, "--publish", "--json", *payer.own_node))
    assert again["txid"] == published["txid"]
    node.mine(3)
    sight = payer.seen(name, payer.own_node)
    assert (sight["spent_by"], sight["by_refund"], sight["state"]) == (published["txid"], True, "refunded")
    assert f"refunded by {published['txid']}, 3 confirmations" in payer.run("watch", "--once", *payer.own_node)


def test_watch_publishes_the_refund_through_an_electrum_server(
    payer: PayerAtTerminal, system: System, node: Node, tmp_path: Path
) -> None:
    """`watch` waits for the median time, publishes by itself, and ends when the refund is deep.

    The server's claim that the channel is settled changes nothing while the chain does not show it.
    """
    name = payer.opened()
    system.kill_server()
    claimed = payer.record(name) | {"state": "closed", "settlement_txid": "5e" * 32}
    (payer.wallet / f"{name}.json").write_text(json.dumps(claimed))
    with ElectrumX(node, tmp_path / "electrumx") as electrumx:
        source = ["--electrum", electrumx.tls_url, "--certificate", str(electrumx.certificate)]
        process, log = payer.start("watch", *source)
        wait_for(lambda: "unspent" in log.read_text(errors="replace"), "seen")
        node.pass_median_time(payer.record(name)["expiry"])
        wait_for(lambda: node.rpc("getrawmempool") != [], "published")
        (txid,) = node.rpc("getrawmempool")
        assert process.poll() is None
        node.mine(3)
        assert process.wait(_PATIENCE_SECONDS) == 0, log.read_text()
    assert f"refunded by {txid}" in log.read_text()
    assert payer.record(name)["state"] == "refunded"


def test_watch_finds_the_settlement_and_marks_the_channel_closed(
    payer: PayerAtTerminal, system: System, node: Node
) -> None:
    """A settlement of which the payer was not informed is found in the chain; then there is nothing to refund."""
    name = payer.opened()
    outpoint = payer.record(name)["funding_outpoint"]
    node.pass_median_time(payer.record(name)["expiry"] - 3600)
    wait_for(lambda: system.channel(outpoint)["status"] == "published", "closing by itself")
    (txid,) = node.rpc("getrawmempool")
    assert "settlement" in payer.run("watch", "--once", *payer.own_node)
    assert payer.record(name)["state"] == "open"
    system.kill_server()
    node.mine(3)

    refused = payer.run("refund", name, "--publish", *payer.own_node, status=1)
    assert f"spent by the settlement {txid}" in refused
    assert (payer.record(name)["state"], payer.record(name)["settlement_txid"]) == ("closed", txid)


def test_a_funding_that_the_server_never_listed_is_refunded(payer: PayerAtTerminal, system: System, node: Node) -> None:
    """The server vanished before it named the output: the payer's own node finds it, and the refund takes it back."""
    process, _, name = payer.new()
    process.send_signal(signal.SIGINT)
    process.wait(_PATIENCE_SECONDS)
    system.kill_server()
    outpoint = payer.fund(name)
    node.pass_median_time(payer.record(name)["expiry"])
    published = json.loads(payer.run("refund", name, "--publish", "--json", *payer.own_node))

    (spent,) = node.rpc("getrawtransaction", published["txid"], True)["vin"]
    assert OutPoint.parse(spent["txid"], spent["vout"]) == outpoint


def test_faults_21_22_24_with_the_real_server(payer: PayerAtTerminal, system: System, node: Node) -> None:
    """Too few hours, too small a typed value and too high a fee are refused with both numbers, and cost nothing."""
    for version in (["--v1"], []):
        refused = payer.run("new", system.url, "--network", "regtest", "--hours", 10, *version, status=1)
        assert "hours of paying is 10, want at least 12" in refused
    process, _, name = payer.new()
    process.send_signal(signal.SIGINT)
    process.wait(_PATIENCE_SECONDS)
    outpoint = payer.fund(name)
    node.mine()
    wait_for(lambda: payer.run("status", name) and payer.record(name)["deposits"], "funding listed")
    refused = payer.run("open", name, "--outpoint", outpoint, "--value", 200_000, status=1)
    assert "got 200,000 sat, the server has 600,000 sat" in refused
    assert payer.record(name)["signed_sat"] is None
    payer.run("open", name, "--outpoint", outpoint, "--value", FUNDING_SAT)
    assert payer.record(name)["funding_source"] == "transaction"

    refused = payer.run("close", name, "--fee", 60_000, status=1)
    assert "fee too high: got 60,000 sat, at most" in refused
    assert payer.record(name)["state"] == "open"
    payer.run("close", name, "--fee", 4_000)
    (txid,) = node.rpc("getrawmempool")
    assert payer.record(name)["offered_fee_sat"] == 4_000
    assert payer.record(name)["paid_fee_sat"] == round(node.rpc("getmempoolentry", txid)["fees"]["base"] * 100_000_000)
