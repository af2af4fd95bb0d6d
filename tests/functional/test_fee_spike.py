"""Many channels expire in the same hour while a fee spike fills the mempool: all settle in time (threat 8).

Repeat it with the fees printed: `pytest -s tests/functional/test_fee_spike.py`.
"""

from __future__ import annotations

import random
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from paychan.protocol.types import OutPoint
from tests.lib.campaign import sized
from tests.lib.crowdedmempool import CrowdedMempool
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, wait_for
from tests.lib.node import Node
from tests.lib.system import System

CHANNELS = sized(40, campaign=200)
HOUR, BLOCK_SECONDS = 3600, 2400

PRICES = [30, 90, *[120] * 9]
"""Minimum rate for a block in sat/vB, per block, every forty minutes: it rises to 120 and stays there."""

FLOORS = {0: 20, 2: 40, 4: 80}
"""Minimum rate for the mempool from these blocks on; transactions below it are evicted."""


@pytest.mark.timeout(600)
def test_threat_8_channels_settle_through_a_fee_spike(tmp_path: Path) -> None:
    """Every settlement is in a block before its refund is valid, for no more than its budget."""
    with (
        Node(tmp_path / "node", "-maxmempool=5") as node,
        System(tmp_path / "system", sections={"settlement": "fee_sat_per_vb = 5"}, node=node) as system,
    ):
        crowd = CrowdedMempool(node)
        first_expiry = int(time.time()) + 30 * HOUR
        channels = open_channels(system, node, first_expiry)
        begin = first_expiry + HOUR - 6 * HOUR
        node.set_mock_time(begin - HOUR)
        while node.median_time < begin:
            node.set_mock_time(node.rpc("getblockheader", node.best)["time"] + 600)
            node.mine_only()
        wait_for(lambda: unfinished(system, "open") == 0, "all closing", 120)

        confirmed: dict[OutPoint, tuple[int, str]] = {}
        for number, price in enumerate(PRICES):
            if number in FLOORS:
                crowd.fill(FLOORS[number])
            looked(system, node)
            node.set_mock_time(node.rpc("getblockheader", node.best)["time"] + BLOCK_SECONDS)
            node.mine_only(*settlements_above(node, channels, price))
            note_confirmed(node, channels, confirmed)
            if len(confirmed) == CHANNELS:
                break

        fees = show(node, channels, confirmed)
        assert len(confirmed) == CHANNELS
        for channel in channels:
            confirmed_at, _ = confirmed[channel.outpoint]
            assert confirmed_at < channel.terms.expiry.lock_time
        assert max(fees) <= OPENING_SAT // 2
        node.mine(3)
        wait_for(lambda: unfinished(system, "published") + unfinished(system, "closing") == 0, "all closed", 60)


def open_channels(system: System, node: Node, first_expiry: int) -> list[Customer]:
    """Fund all channels in one transaction, and open them; their expiries are spread over an hour."""
    spread = random.Random(8)
    customers = [Customer(system, node, first_expiry + spread.randrange(HOUR)) for _ in range(CHANNELS)]
    amount = str(Decimal(FUNDING_SAT).scaleb(-8))
    txid = node.rpc("sendmany", "", {customer.address: amount for customer in customers}, wallet="miner")
    vouts = {out["scriptPubKey"]["address"]: out["n"] for out in node.rpc("getrawtransaction", txid, True)["vout"]}
    node.mine()
    for customer in customers:
        customer.outpoint = OutPoint.parse(txid, vouts[customer.address])
    wait_for(lambda: customers[0].open().status_code == 201, "the block is seen")
    for customer in customers[1:]:
        assert customer.open().status_code == 201
    return customers


def unfinished(system: System, state: str) -> int:
    return int(system.manage("GET", "/totals").json()["channels"][state])


def looked(system: System, node: Node) -> None:
    """Wait until the server has scanned all channels after the newest block."""
    health = {}

    def is_seen() -> bool:
        health.update(system.manage("GET", "/health").json())
        return bool(health["chain"]["height"] == node.height)

    wait_for(is_seen, "the block", 60)
    last = health["watcher_last_look"]
    wait_for(lambda: system.manage("GET", "/health").json()["watcher_last_look"] > last, "a look", 60)


def settlements_above(node: Node, channels: list[Customer], sat_per_vb: int) -> list[str]:
    """Return the transactions in the mempool that pay a block's minimum rate."""
    pool = node.rpc("getrawmempool", True)
    funded = [{"txid": channel.outpoint.txid_hex, "vout": channel.outpoint.vout} for channel in channels]
    ours = {spend.get("spendingtxid") for spend in node.rpc("gettxspendingprevout", funded)}
    return [
        txid
        for txid in ours & set(pool)
        if pool[txid]["fees"]["base"] * 100_000_000 >= sat_per_vb * pool[txid]["vsize"]
    ]


def note_confirmed(node: Node, channels: list[Customer], confirmed: dict[OutPoint, tuple[int, str]]) -> None:
    """Find the settlements in the newest block, and the median time before it, which decides whether a refund is final."""
    block = node.rpc("getblock", node.best, 2)
    before = node.rpc("getblockheader", block["previousblockhash"])["mediantime"]
    funded = {channel.outpoint for channel in channels}
    for transaction in block["tx"][1:]:
        for txin in transaction["vin"]:
            outpoint = OutPoint.parse(txin["txid"], txin["vout"])
            if outpoint in funded:
                confirmed[outpoint] = before, transaction["txid"]


def show(node: Node, channels: list[Customer], confirmed: dict[OutPoint, tuple[int, str]]) -> list[int]:
    """Print the paid fees beside the possible ones, and return the fees in satoshi."""
    by_block: dict[int, list[Any]] = {}
    expiry = min(channel.terms.expiry.lock_time for channel in channels)
    fees = []
    for outpoint, (moment, txid) in confirmed.items():
        transaction = node.rpc("gettransaction", txid, True, True, wallet="paychan")["decoded"]
        fee = FUNDING_SAT - sum(int(out["value"] * 100_000_000) for out in transaction["vout"])
        fees.append(fee)
        by_block.setdefault(moment, []).append((outpoint, fee, transaction["vsize"]))
    table = Table(title=f"{len(confirmed)} of {len(channels)} settlements confirmed before expiry")
    for column in ("hours before first expiry", "settlements", "sat/vB", "fees, sat"):
        table.add_column(column, justify="right")
    for moment, rows in sorted(by_block.items()):
        rates = [fee / size for _, fee, size in rows]
        span = f"{min(rates):.0f} to {max(rates):.0f}"
        table.add_row(f"{(expiry - moment) / HOUR:.1f}", str(len(rows)), span, f"{sum(fee for _, fee, _ in rows):,}")
    console = Console(width=100)
    console.print(table)
    console.print(f"paid {sum(fees):,} sat of a budget of {len(channels) * OPENING_SAT // 2:,} sat")
    return fees
