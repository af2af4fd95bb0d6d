"""A backup from before the opening is restored: the payer's client goes on, and what it paid is settled on the chain."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from paychan.client import Channel, Network, Patience, Payer
from paychan.protocol.types import OutPoint
from tests.lib.customer import market, wait_for
from tests.lib.node import Node
from tests.lib.restoring import back_up, lose_and_restore
from tests.lib.system import System

FUNDING_SAT = 1_000_000
PATIENT = Patience(attempts=20, first_pause_seconds=0.1, longest_pause_seconds=0.5)


def funded(system: System, node: Node, wallet: Path, version: Literal[1, 2], *, movable: bool = False) -> Channel:
    payer = Payer(system.url, wallet=wallet, version=version, network=Network.REGTEST, patience=PATIENT)
    channel = payer.new_channel(hours=24, movable=movable)
    node.fund(channel.address, FUNDING_SAT)
    return channel


def moved(system: System, node: Node, channel: Channel) -> None:
    """Let the operator withdraw, and pay at the change output."""
    txid, vout = channel.record.funding_outpoint.split(":")
    assert system.manage("POST", f"/channels/{txid}/{vout}/withdraw").status_code == 200
    node.mine(2)
    wait_for(lambda: bool(system.channel(f"{txid}:{vout}").get("moved_to")), "moved")
    channel.pay(150_000)
    assert len(channel.record.moves) == 1


def paid_back(node: Node, outpoint: OutPoint) -> int:
    """Satoshi of the change in the settlement that spends an output."""
    at = {"txid": outpoint.txid_hex, "vout": outpoint.vout}
    wait_for(lambda: "spendingtxid" in node.rpc("gettxspendingprevout", [at])[0], "settlement published")
    txid = node.rpc("gettxspendingprevout", [at])[0]["spendingtxid"]
    return int(node.rpc("getrawtransaction", txid, True)["vout"][0]["value"].scaleb(8))


def test_fault_11_channels_opened_since_the_backup_are_settled(tmp_path: Path) -> None:
    """In both versions, and at the output that a channel moved to; closed by payer and operator."""
    wallet = tmp_path / "wallet"
    with market(tmp_path) as (system, node):
        backup = back_up(system)
        v1, v2 = funded(system, node, wallet, 1), funded(system, node, wallet, 2)
        mover = funded(system, node, wallet, 2, movable=True)
        node.mine()
        for channel in (v1, v2, mover):
            channel.wait_funded(60)
            channel.open()
            channel.pay(50_000)
        moved(system, node, mover)
        lose_and_restore(system, backup)
        for channel in (v1, v2, mover):
            assert channel.pay(1_000).reopened
            assert not channel.pay(1_000).reopened
            record = channel.record
            assert system.channel(record.funding_outpoint)["value_received"] == record.funding_sat - record.left_sat
        v1.close()
        mover.close()
        txid, vout = v2.record.funding_outpoint.split(":")
        assert system.manage("POST", f"/channels/{txid}/{vout}/close").status_code == 200
        for channel in (v1, v2, mover):
            assert paid_back(node, channel.record.outpoint) == channel.left_sat
        node.mine(2)
        for channel in (v1, v2, mover):
            at = channel.record.funding_outpoint
            wait_for(lambda at=at: system.channel(at)["status"] == "closed", "closed")  # type: ignore[misc]


def test_fault_11_a_withdrawal_that_the_server_finds_later(tmp_path: Path) -> None:
    """The backup has the channel at its first output. Whether payer or server is first, the channel goes on at the second."""
    with market(tmp_path) as (system, node):
        mover = funded(system, node, tmp_path / "wallet", 2, movable=True)
        node.mine()
        mover.wait_funded(60)
        mover.open()
        mover.pay(50_000)
        first, backup = mover.record.funding_outpoint, back_up(system)
        moved(system, node, mover)
        lose_and_restore(system, backup)
        mover.pay(1_000)
        second = mover.record.funding_outpoint
        wait_for(lambda: system.channel(first).get("moved_to") == second, "followed")
        mover.pay(1_000)
        assert system.channel(second)["value_received"] == mover.record.funding_sat - mover.left_sat == 152_000
        mover.close()
        assert paid_back(node, mover.record.outpoint) == mover.left_sat
