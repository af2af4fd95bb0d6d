"""A payer loses the wallet on a real chain: the backup brings the refund, and the words bring the change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.test_regtest_payer import FUNDING_SAT, PayerAtTerminal
from tests.lib.node import Node
from tests.lib.system import System

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


def wallet(payer: PayerAtTerminal, *words: object) -> str:
    """Run `paychan wallet` on the payer's directory."""
    command = [_PROGRAM, "wallet", *map(str, words), "--wallet", payer.wallet]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_fault_50_a_restored_wallet_takes_the_refund(
    payer: PayerAtTerminal, system: System, node: Node, tmp_path: Path
) -> None:
    """Paid after the backup, lost, restored; the server is gone: the refund of the restored wallet confirms."""
    name = payer.opened()
    wallet(payer, "backup", tmp_path / "copy.wallet")
    payer.run("pay", name, 1000)
    expiry = payer.record(name)["expiry"]
    shutil.rmtree(payer.wallet)
    system.kill_server()

    assert json.loads(wallet(payer, "restore", tmp_path / "copy.wallet", "--json"))["written"] == [name]

    node.pass_median_time(expiry)
    published = json.loads(payer.run("refund", name, "--publish", "--json", *payer.own_node))
    assert node.rpc("getrawmempool") == [published["txid"]]
    node.mine(3)
    sight = payer.seen(name, payer.own_node)
    assert (sight["spent_by"], sight["state"]) == (published["txid"], "refunded")


def test_fault_50_a_restored_wallet_pays_and_closes(
    payer: PayerAtTerminal, system: System, node: Node, tmp_path: Path
) -> None:
    """The restored wallet takes over what was paid since the backup; the settlement pays the change that is left."""
    name = payer.opened()
    wallet(payer, "backup", tmp_path / "copy.wallet")
    payer.run("pay", name, 1000)
    shutil.rmtree(payer.wallet)
    wallet(payer, "restore", tmp_path / "copy.wallet")

    receipt = json.loads(payer.run("pay", name, 10, "--json"))

    assert (receipt["taken_over_sat"], receipt["paid_sat"]) == (1000, 10)
    settled = json.loads(payer.run("close", name, "--json"))
    assert settled["change_sat"] == FUNDING_SAT - payer.record(name)["open_price_sat"] - 1010
    node.mine()
    assert node.rpc("gettxout", settled["settlement_txid"], 0)["value"] * 100_000_000 == settled["change_sat"]


def test_fault_50_the_words_alone_bring_the_change_into_bitcoin_core(
    payer: PayerAtTerminal, system: System, node: Node, tmp_path: Path
) -> None:
    """Bitcoin Core imports the descriptor that the words give, and can spend the change of the settled channel."""
    name = payer.opened()
    change_sat = json.loads(payer.run("close", name, "--json"))["change_sat"]
    node.mine()
    wallet(payer, "words", "--words-file", tmp_path / "words")
    shutil.rmtree(payer.wallet)
    wallet(payer, "restore", "--words-file", tmp_path / "words")
    descriptor = wallet(payer, "words", "--descriptor", "--yes", "--network", "regtest").strip()

    node.rpc("createwallet", "change", False, True)
    request = {"desc": descriptor, "timestamp": 0, "range": [0, 999], "internal": False}
    (done,) = node.rpc("importdescriptors", [request], wallet="change")

    assert done["success"], done
    assert node.rpc("getbalance", wallet="change") * 100_000_000 == change_sat
    txid = node.rpc("sendall", [node.address()], wallet="change")["txid"]
    assert txid in node.rpc("getrawmempool")
