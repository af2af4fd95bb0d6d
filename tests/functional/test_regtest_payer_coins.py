"""What the payer's own node shows is the truth: lying servers, deposits of every kind, and refunds that are replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from bitcoin.core import CTransaction
from typer.testing import CliRunner, Result

from paychan.cli.channel import app
from paychan.client import Channel, Network, Payer
from paychan.protocol.types import OutPoint
from tests.client.conftest import IMPATIENT
from tests.client.liar import Liar, Lie
from tests.lib.node import Node

FUNDING_SAT = 600_000
BUDGET_SAT = 2_000
"""More than the fee of any refund here at the least rate."""


class Found(Protocol):
    def __call__(self, *outputs: tuple[OutPoint, int], **more: Any) -> None: ...


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", "-txindex=1") as node:
        yield node


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar() as liar:
        yield liar


@pytest.fixture
def wallet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: Node) -> Path:
    """A wallet, and the payer's own node, both named by the environment."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "wallet"))
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path / "wallet"


@pytest.fixture
def own_node(node: Node) -> list[str]:
    return ["--node", node.url, "--credentials", str(node.credentials)]


@pytest.fixture
def new(liar: Liar, wallet: Path) -> Iterator[Callable[[], Channel]]:
    """Make channels of the regtest network, whose files are free for commands."""
    payer = Payer(liar.url, wallet=wallet, network=Network.REGTEST, patience=IMPATIENT)

    def make() -> Channel:
        channel = payer.new_channel(hours=100)
        channel.release()
        return channel

    yield make
    payer.close()


def say(*words: object, status: int = 0) -> Result:
    """Run a payer's command, which ends with this status."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result


def told(*words: object, status: int = 0) -> Any:
    return json.loads(say(*words, "--json", status=status).stdout)


def server_lists(liar: Liar, channel: Channel, *outputs: tuple[OutPoint, int], **more: Any) -> None:
    """Have the server tell these outputs, deep enough."""
    listed = [
        {
            "funding_txid": outpoint.txid_hex,
            "funding_vout": outpoint.vout,
            "value": value,
            "confirmations": 6,
            "confirmations_needed": 1,
        }
        | more
        for outpoint, value in outputs
    ]
    liar.info_lie = Lie(body=json.dumps({"funding_address": channel.address, "outputs": listed}).encode())


def noted(name: str) -> Any:
    """What the wallet holds of a channel."""
    return told("status", name, "--offline")


def inputs_and_fee(node: Node, txid: str) -> tuple[set[str], int]:
    """Outpoints that a transaction in the mempool spends, and the fee that it pays really."""
    transaction = node.rpc("getrawtransaction", txid, True)
    fee = node.rpc("getmempoolentry", txid)["fees"]["base"]
    return {f"{each['txid']}:{each['vout']}" for each in transaction["vin"]}, round(fee * 100_000_000)


def only_refund(node: Node) -> tuple[set[str], int]:
    (txid,) = node.rpc("getrawmempool")
    return inputs_and_fee(node, txid)


# --- 17: the value and the outpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["less", "more", "another output", "somebody's output"])
def test_fault_17_the_refund_takes_what_the_chain_shows(
    node: Node, liar: Liar, new: Callable[[], Channel], own_node: list[str], lie: str
) -> None:
    """Whatever the server told of outpoint and value, the refund spends what is at the address, for a small fee."""
    channel = new()
    outpoint = node.fund(channel.address, FUNDING_SAT)
    node.mine()
    elsewhere = node.fund(node.rpc("getnewaddress"), 700_000)
    node.mine()
    claimed = {
        "less": (outpoint, 100_000),
        "more": (outpoint, 900_000),
        "another output": (OutPoint(bytes(32), 3), FUNDING_SAT),
        "somebody's output": (elsewhere, 700_000),
    }[lie]
    server_lists(liar, channel, claimed)
    assert told("open", channel.name, "--no-wait", status=1)["code"] != "value_unchecked"  # the server refuses it
    assert noted(channel.name)["funding_outpoint"] == str(claimed[0])
    assert noted(channel.name)["funding_source"] == "server"
    node.pass_median_time(channel.record.expiry)

    shown = told("refund", channel.name, "--publish", *own_node)
    spent, fee = only_refund(node)
    assert (spent, fee) == ({str(outpoint)}, shown["fee_sat"])
    assert fee < BUDGET_SAT
