"""The chain's state overrides the record's, in every state: on a real node, with the real server and signer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, code, market, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

PAYCHAN = Path(sys.executable).with_name("paychan")
TRUSTING = {"open": "smaller = [{ up_to_sat = 2000000, confirmations = 0 }]\nunconfirmed_limit_sat = 1500000"}


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("word")) as place:
        yield place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Market]:
    """A separate chain, whose time the test may move."""
    with market(tmp_path / "market") as place:
        yield place


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    """A server that opens channels on funding without a confirmation."""
    with market(tmp_path_factory.mktemp("trusting"), TRUSTING) as place:
        yield place


def settle_offline(system: System) -> dict[str, Any]:
    """Back up the running server, kill it, settle the backup with `paychan settle --offline`, and publish."""
    backups: list[str] = []
    wait_for(
        lambda: "path" in (made := system.manage("POST", "/backups").json()) and backups.append(made["path"]) is None,
        "a backup: one a second",
    )
    (backup,) = backups
    system.kill_server()
    command = [PAYCHAN, "settle", "--offline", backup, "--config", system.server_file, "--publish", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def alarms(system: System) -> list[dict[str, str]]:
    """Return all alarms except that of the clock: tests move the chain's time."""
    return [alarm for alarm in system.manage("GET", "/health").json()["alarms"] if alarm["kind"] != "clock"]


def totals(system: System) -> dict[str, Any]:
    found: dict[str, Any] = system.manage("GET", "/totals").json()
    return found


def expire(node: Node, customer: Customer) -> None:
    """Let a channel's refund become valid, in blocks without transactions of the mempool."""
    node.set_mock_time(customer.terms.expiry.lock_time + 60)
    while node.median_time <= customer.terms.expiry.lock_time:
        node.mine_only()


# --- settlements that the record lacks ------------------------------------------------------------------------------


@pytest.mark.parametrize("mined", [True, False], ids=["mined", "in the mempool"])
@pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])
def test_fault_12_a_settlement_missing_in_the_record_closes_the_channel(
    market_place: Market, mined: bool, kind: type[Customer]
) -> None:
    """Mined before the server's restart or after it: CLOSED with its txid, no alarm, nothing lost."""
    system, node = market_place
    customer = kind(system, node)
    customer.opened()
    assert customer.pay(OPENING_SAT + 5_000).status_code == 200
    settle_offline(system)
    if mined:
        node.mine(2)
    system.start_server()
    if not mined:
        wait_for(lambda: customer.record["status"] == "published", "found")
        node.mine(2)

    customer.ends("closed")
    found = customer.record
    mined = node.rpc("getrawtransaction", found["settlement_txid"], True, node.rpc("getblockhash", node.height - 1))
    paid = {out["scriptPubKey"]["hex"]: int(out["value"] * 100_000_000) for out in mined["vout"]}
    assert paid[customer.change_script.hex()] == FUNDING_SAT - OPENING_SAT - 5_000
    assert found["value_received"] == OPENING_SAT + 5_000
    assert (totals(system)["channels"]["lost"], alarms(system)) == (0, [])


def test_fault_12_a_batch_missing_in_the_records_closes_all_its_channels(tmp_path: Path) -> None:
    """Drained channels that were settled together after the backup become CLOSED by one txid, although stored as OPEN."""
    with market(tmp_path, {"settlement": "batch_seconds = 36000\nbatch_channels = 3"}) as (system, node):
        customers = [Customer(system, node) for _ in range(3)]
        for each in customers:
            each.opened()
        backup = system.manage("POST", "/backups").json()["path"]
        for each in customers:
            assert each.pay(FUNDING_SAT).status_code == 202
        wait_for(lambda: {each.record["status"] for each in customers} == {"published"}, "settled together")
        system.kill_server()
        restore(system, backup)
        node.mine(2)
        for each in customers:
            each.ends("closed")
        assert len({each.record["settlement_txid"] for each in customers}) == 1
        assert [each.record["value_received"] for each in customers] == [FUNDING_SAT] * 3
        assert alarms(system) == []


def restore(system: System, backup: str) -> None:
    """Lose the server's store, and restore a backup with the real command."""
    (system.state / "store").rename(system.directory / f"store lost with {Path(backup).name}")
    done = subprocess.run(
        [PAYCHAN, "backup", "restore", system.server_file, backup], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    system.start_server()


# --- refunds --------------------------------------------------------------------------------------------------------


def test_fault_12_a_lost_channel_is_restored_by_a_reorg_of_its_refund(place: Market) -> None:
    """Refund deep: LOST.

    A reorg to the settlement: CLOSED. Twice back and forth: the state always follows the chain.
    """
    system, node = place
    customer = Customer(system, node)
    customer.opened()
    assert system.signer is not None
    system.kill_server()
    expire(node, customer)
    base = node.height
    refund = node.send_raw(customer.refund().transaction)
    node.mine_only(refund)
    node.mine_only()
    system.start_server()
    customer.ends("lost")
    assert customer.record["spent_by"] == refund
    assert [alarm["kind"] for alarm in alarms(system)] == ["lost"]

    for _ in range(2):
        node.invalidate(node.height - base)
        for _ in range(6):
            node.mine_only()
        wait_for(lambda: customer.record["status"] != "lost", "taken up again")
        settlement = wait_for_settlement(system, node, customer)
        node.mine_only(settlement)
        node.mine_only()
        customer.ends("closed")
        assert customer.record["spent_by"] is None
        wait_for(lambda: alarms(system) == [], "no alarm")
        assert totals(system)["received_sat"]["lost"] == 0

        node.invalidate(node.height - base)
        node.mine_only(customer.refund().transaction.hex())
        for _ in range(8):
            node.mine_only()
        customer.ends("lost")
        assert totals(system)["received_sat"]["lost"] == OPENING_SAT


def wait_for_settlement(system: System, node: Node, customer: Customer) -> str:
    """Wait for a settlement of the channel in the mempool; return its txid. By its fee it replaces the refund."""

    def spender() -> str:
        outpoint = {"txid": customer.outpoint.txid_hex, "vout": customer.outpoint.vout}
        return str(node.rpc("gettxspendingprevout", [outpoint])[0].get("spendingtxid", ""))

    wait_for(lambda: spender() != "" and spender() == customer.record["settlement_txid"], "settlement published")
    return spender()


def test_fault_04_a_closing_channel_without_settlement_sees_a_deep_refund(place: Market) -> None:
    """The signer is stopped while the channel closes, and the client's refund is mined: LOST."""
    system, node = place
    customer = Customer(system, node)
    customer.opened()
    assert system.signer is not None
    system.signer.stop()
    txid, vout = str(customer.outpoint).split(":")
    system.manage("POST", f"/channels/{txid}/{vout}/close")
    assert customer.record["status"] == "closing"
    expire(node, customer)
    refund = node.send_raw(customer.refund().transaction)
    node.mine_only(refund)
    node.mine_only()

    customer.ends("lost")
    assert customer.record["spent_by"] == refund


def another_spend(node: Node, customer: Customer) -> str:
    """Double-spend the inputs of the funding transaction, back to the payer's wallet."""
    funding = node.rpc("gettransaction", customer.outpoint.txid_hex, True, True, wallet="miner")["decoded"]
    spent = [{"txid": each["txid"], "vout": each["vout"]} for each in funding["vin"]]
    raw = node.rpc("createrawtransaction", spent, [{node.address(): "0.001"}])
    signed: str = node.rpc("signrawtransactionwithwallet", raw, wallet="miner")["hex"]
    return signed


# --- funding that was never mined -----------------------------------------------------------------------------------


@pytest.mark.parametrize("drained", [False, True], ids=["open", "drained"])
def test_fault_10_a_replaced_funding_ends_the_channel(trusting: Market, drained: bool) -> None:
    """Open or drained, double-spent deep: UNFUNDED, no alarm, its limit free again; and back if a reorg revives it."""
    system, node = trusting
    node.mine()  # the fundings of earlier tests count against the limit until they are confirmed
    customer = Customer(system, node)
    customer.fund()
    funding = node.rpc("getrawtransaction", customer.outpoint.txid_hex)
    wait_for(lambda: customer.open().status_code == 201, "opened")
    if drained:
        assert customer.pay(FUNDING_SAT).status_code == 202
    node.mine_only(another_spend(node, customer))
    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code != 200, "frozen or closed")
    node.mine_only()
    wait_for(lambda: customer.record["status"] != "open" or not drained, "looked at")
    node.mine(2)

    customer.ends("unfunded")
    assert code(customer.pay(OPENING_SAT + 1)) == (410, "never_funded")
    wait_for(lambda: alarms(system) == [], "no alarm")
    other = Customer(system, node)
    other.fund()
    wait_for(lambda: other.open().status_code == 201, "room for another one under the limit")

    node.invalidate(4)
    node.mine_only(funding)
    for _ in range(4):
        node.mine_only()
    wait_for(lambda: customer.record["status"] != "unfunded", "revived")
    if drained:
        wait_for(lambda: customer.record["status"] == "published", "settled again")
        node.mine_only(customer.record["settlement_txid"])
        node.mine_only()
        customer.ends("closed")
    else:
        wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 200, "paying again")
