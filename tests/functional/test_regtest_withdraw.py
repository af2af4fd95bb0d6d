"""Withdrawals on a real chain: the channel continues, the payer follows by itself, and every satoshi adds up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CTransaction

from paychan.client import Channel, ChannelMoving, Dialect, Network, Patience, Payer, Receipt, ServerFailed
from paychan.protocol.address import decode_address
from tests.functional.test_regtest_fees import pass_time
from tests.functional.test_regtest_payer import FUNDING_SAT, PayerAtTerminal
from tests.lib.customer import market, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

IMPATIENT = Patience(attempts=1)
PATIENT = Patience(attempts=10)
_PROGRAM = Path(sys.executable).parent / "paychan"


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("withdraw")) as (system, node):
        yield system, node


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Market]:
    """A separate chain, whose time the test may move."""
    with market(tmp_path / "market") as (system, node):
        yield system, node


def withdraw(system: System, *words: object) -> Any:
    """Run the operator's command."""
    done = subprocess.run(
        [_PROGRAM, "withdraw", system.server_file, *map(str, words), "--json"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def opened(payer: Payer, node: Node) -> Channel:
    """Return a movable channel of 600,000 sat."""
    channel = payer.new_channel(hours=40, movable=True, amount_sat=FUNDING_SAT)
    node.fund(channel.address, FUNDING_SAT)
    node.mine()
    channel.wait_funded(20)
    wait_for(lambda: _opens(channel), "opened")
    return channel


def _opens(channel: Channel) -> bool:
    channel.open()
    return True


def moves_on(system: System, node: Node, outpoint: str) -> str:
    """Confirm a withdrawal; return the channel's new output."""
    node.mine()
    wait_for(lambda: system.channel(outpoint)["moved_to"] is not None, "moved")
    return str(system.channel(outpoint)["moved_to"])


def waits_and_pays(channel: Channel, amount_sat: int) -> tuple[threading.Thread, list[Receipt]]:
    """A payment in a thread of its own, which waits until the channel has moved."""
    receipts: list[Receipt] = []
    thread = threading.Thread(target=lambda: receipts.append(channel.pay(amount_sat)))
    thread.start()
    return thread, receipts


@pytest.mark.parametrize("dialect", Dialect)
def test_a_channel_with_two_withdrawals(market_place: Market, tmp_path: Path, dialect: Dialect) -> None:
    """Pay, withdraw, wait, pay, withdraw, a reorg, pay, close: totals continue, and all outputs add up to the funding."""
    system, node = market_place
    with Payer(system.url, wallet=tmp_path, network=Network.REGTEST, dialect=dialect, patience=PATIENT) as payer:
        channel = opened(payer, node)
        price = channel.record.open_price_sat
        channel.pay(50_000)
        first = channel.record.funding_outpoint

        began = withdraw(system, first)
        assert (began["status"], began["moving"], began["moved_to"]) == ("published", True, None)
        assert node.rpc("getrawmempool") == [began["settlement_txid"]]
        thread, receipts = waits_and_pays(channel, 1_000)
        wait_for(lambda: channel.record.unacknowledged, "payment under way")
        second = moves_on(system, node, first)
        thread.join(60)
        assert [receipt.total_paid_sat for receipt in receipts] == [price + 51_000]
        assert channel.record.funding_outpoint == second == f"{began['settlement_txid']}:0"
        assert system.server is not None
        (event,) = (
            line for line in system.server.text().splitlines() if "earnings withdrawn" in line and first in line
        )
        assert f"moved_to={second}" in event
        assert re.search(rf"received_sat={price + 50_000}\b.*fee_sat=[1-9]", event)
        assert node.rpc("gettxout", began["settlement_txid"], 0)["value"] * 100_000_000 == channel.record.funding_sat

        channel.pay(60_000)
        channel.release()
        with Payer(wallet=tmp_path, patience=IMPATIENT) as other, other.channel(channel.name) as again:
            chosen = withdraw(system, "--above", 61_000)
            assert [each["funding_source"] for each in chosen["channels"]] == [second]
            with pytest.raises(ChannelMoving):
                again.pay(2_000)
            third = moves_on(system, node, second)
            assert again.resume().total_paid_sat == price + 113_000

            node.invalidate(1)
            wait_for(lambda: not _pays(again), "frozen while the withdrawal is in no block")
            node.mine(2)
            wait_for(lambda: _pays(again), "thawed")
            assert again.record.funding_outpoint == third

            home = node.address()
            paid = again.paid_sat
            settled = again.close(fee_sat=1_000, change_address=home)
            assert settled.change_sat == FUNDING_SAT - paid - 1_000
            node.mine(2)
            wait_for(lambda: system.channel(third)["status"] == "closed", "closed")
        accounted(system, node, [first, second, third], settled.change_sat, home)


def _pays(channel: Channel) -> bool:
    """Pay a satoshi, or complete the payment in flight."""
    try:
        if channel.record.unacknowledged:
            channel.resume()
        else:
            channel.pay(1)
    except ServerFailed as error:
        assert error.code in ("chain_unavailable", "channel_moving")  # noqa: PT017 - any other error is a bug
        return False
    return True


def accounted(system: System, node: Node, outpoints: list[str], change_sat: int, home: str) -> None:
    """Each settlement pays the server its earnings less the fee, and the last one pays the payer the rest."""
    server_sat, fees_sat = 0, 0
    for outpoint in outpoints:
        record = system.channel(outpoint)
        transaction = CTransaction.deserialize(bytes.fromhex(record["settlement_transaction"]))
        ours = transaction.vout[1].nValue
        assert ours == record["value_received"] - record["settlement_fee"]
        assert node.rpc("gettxout", record["settlement_txid"], 1)["value"] * 100_000_000 == ours
        server_sat, fees_sat = server_sat + ours, fees_sat + record["settlement_fee"]
    last = CTransaction.deserialize(bytes.fromhex(record["settlement_transaction"])).vout[0]
    assert (last.nValue, bytes(last.scriptPubKey)) == (change_sat, decode_address(home, Network.REGTEST))
    assert server_sat + fees_sat + change_sat == FUNDING_SAT


def test_the_refund_of_the_new_output_is_valid(place: Market, tmp_path: Path) -> None:
    """The refund saved before the first payment at the new output returns everything when the server is gone."""
    system, node = place
    with Payer(system.url, wallet=tmp_path / "wallet", network=Network.REGTEST, patience=PATIENT) as payer:
        channel = opened(payer, node)
        channel.pay(50_000)
        withdraw(system, channel.record.funding_outpoint)
        moves_on(system, node, channel.record.funding_outpoint)
        channel.pay(700)
        record = channel.record
    system.kill_server()
    early = node.rpc("testmempoolaccept", [record.refunds[-1]])[0]
    assert early["reject-reason"] == "non-final"
    node.pass_median_time(record.expiry)
    txid = node.send_raw(bytes.fromhex(record.refunds[-1]))
    node.mine()
    refunded = node.rpc("gettxout", txid, 0)
    assert refunded["confirmations"] == 1
    assert refunded["scriptPubKey"]["address"] == record.home_address
    assert record.funding_sat - 2_000 < refunded["value"] * 100_000_000 < record.funding_sat


def test_change_of_an_unasked_closing_is_refunded(place: Market, tmp_path: Path) -> None:
    """The change is then in the channel's script: after the expiry the payer finds it in the chain and refunds it."""
    system, node = place
    terminal = PayerAtTerminal(tmp_path, system, node)
    name = terminal.opened("--movable")
    outpoint = terminal.record(name)["funding_outpoint"]
    terminal.run("pay", name, 40_000)
    closed = system.manage("POST", f"/channels/{outpoint.replace(':', '/')}/close").json()
    node.mine(3)
    wait_for(lambda: system.channel(outpoint)["status"] == "closed", "closed")
    assert closed["settlement_txid"] in terminal.run("pay", name, 5, status=1)
    reported = terminal.run("watch", name, "--once", *terminal.own_node)
    assert "unspent" in reported, reported
    assert terminal.record(name)["funding_outpoint"] == f"{closed['settlement_txid']}:0"
    system.kill_server()
    node.pass_median_time(terminal.record(name)["expiry"])

    refund = json.loads(terminal.run("refund", name, "--publish", "--json", *terminal.own_node))
    node.mine(3)
    output = node.rpc("gettxout", refund["txid"], 0)
    left = FUNDING_SAT - 40_000 - terminal.record(name)["open_price_sat"]
    assert output["value"] * 100_000_000 == left - refund["fee_sat"]
    assert terminal.seen(name, terminal.own_node)["state"] == "refunded"


def test_the_payers_commands_follow_a_move(market_place: Market, tmp_path: Path) -> None:
    """A payment during a move waits, and is paid at the new output; closing pays the change to the home address."""
    system, node = market_place
    terminal = PayerAtTerminal(tmp_path, system, node)
    name = terminal.opened("--movable")
    record = terminal.record(name)
    assert record["change_address"] == record["funding_address"]
    terminal.run("pay", name, 40_000)
    withdraw(system, record["funding_outpoint"])
    reported = terminal.run("watch", name, "--once", *terminal.own_node)
    assert "moved to" in reported, reported
    process, log = terminal.start("pay", name, "1000")
    wait_for(lambda: terminal.record(name)["signed_sat"] != terminal.record(name)["acknowledged_sat"], "under way")
    moved_to = moves_on(system, node, record["funding_outpoint"])
    assert process.wait(60) == 0, log.read_text()
    assert "1,000 sat" in log.read_text()
    assert terminal.record(name)["funding_outpoint"] == moved_to
    assert "once" in terminal.run("status", name)
    txid, vout = moved_to.split(":")
    assert txid in terminal.run("close", name, "--fee", 1_000)
    settled = system.channel(f"{txid}:{vout}")
    change = CTransaction.deserialize(bytes.fromhex(settled["settlement_transaction"])).vout[0]
    assert bytes(change.scriptPubKey) != decode_address(record["funding_address"], Network.REGTEST)
    node.mine(2)
    terminal.leave()


@pytest.mark.parametrize("dialect", Dialect)
def test_the_payer_closes_to_a_new_address_for_a_fee_of_its_choice(
    market_place: Market, tmp_path: Path, dialect: Dialect
) -> None:
    """`close --fee --to`: the settlement on the chain pays the change there, and at least the offered fee."""
    system, node = market_place
    terminal = PayerAtTerminal(tmp_path, system, node)
    name = terminal.opened("--dialect", dialect.value)
    home = node.address()
    shown = terminal.run("close", name, "--fee", 30_000, "--to", home)
    record = terminal.record(name)
    left = FUNDING_SAT - record["open_price_sat"] - 30_000
    assert home in shown
    assert node.rpc("getrawmempool") == [record["settlement_txid"]]
    fee = node.rpc("getmempoolentry", record["settlement_txid"])["fees"]["base"] * 100_000_000
    assert fee == system.channel(record["funding_outpoint"])["settlement_fee"] >= 30_000
    node.mine(2)
    change = node.rpc("gettxout", record["settlement_txid"], 0)
    assert (change["value"] * 100_000_000, change["scriptPubKey"]["address"]) == (left, home)
    wait_for(lambda: system.channel(record["funding_outpoint"])["status"] == "closed", "closed")
    terminal.leave()


def test_fault_08_a_withdrawal_with_dependent_payments_gets_a_child(place: Market, tmp_path: Path) -> None:
    """A reorg removes it after the channel received 200,000 sat at its output: same txid, and a child pays for it."""
    system, node = place
    with Payer(system.url, wallet=tmp_path / "wallet", network=Network.REGTEST, patience=PATIENT) as payer:
        channel = opened(payer, node)
        channel.pay(50_000)
        began = withdraw(system, channel.record.funding_outpoint)
        moved_to = moves_on(system, node, channel.record.funding_outpoint)
        channel.pay(200_000)
        expiry = channel.record.expiry
    txid = began["settlement_txid"]
    node.invalidate(1)
    assert node.rpc("getrawmempool") == [txid]
    pass_time(node, expiry - 9 * 3600)
    wait_for(lambda: len(node.rpc("getrawmempool")) == 2, "pushed")
    assert txid in node.rpc("getrawmempool")
    entry = node.rpc("getmempoolentry", txid)
    assert entry["fees"]["descendant"] * 100_000_000 > 100 * entry["descendantsize"] / 2
    node.mine(3)
    source = moved_to.replace(":", "/")
    wait_for(lambda: system.manage("POST", f"/channels/{source}/close").status_code == 200, "closed")
    node.mine(2)
    wait_for(lambda: system.channel(moved_to)["status"] == "closed", "settled")
    assert system.channel(moved_to)["value_received"] == 200_000


def test_fault_08_the_next_settlement_pays_for_a_withdrawal(tmp_path: Path) -> None:
    """No key of the signer's can spend its output, and payments depend on its txid, so it is never replaced.

    After a reorg an alarm names the channel whose settlement would pay for both; with that settlement, the alarm ends.
    """
    with Node(tmp_path / "node") as node:
        system = System(tmp_path / "system", node=node)
        with system.signer_file.open("a") as file:
            file.write(f'[settlement]\ndestination_address = "{node.address()}"\n')
        with system, Payer(system.url, wallet=tmp_path / "w", network=Network.REGTEST, patience=PATIENT) as payer:
            channel = opened(payer, node)
            withdrawn = channel.record.funding_outpoint
            channel.pay(50_000)
            txid = withdraw(system, withdrawn)["settlement_txid"]
            moved_to = moves_on(system, node, withdrawn)
            channel.pay(200_000)
            node.invalidate(1)
            pass_time(node, channel.record.expiry - 9 * 3600)

            def pinned() -> list[str]:
                alarms = system.manage("GET", "/health").json()["alarms"]
                return [alarm["text"] for alarm in alarms if alarm["kind"] == "pinned"]

            wait_for(lambda: any(moved_to in text for text in pinned()), "an alarm")
            pass_time(node, channel.record.expiry - 5 * 3600)  # the server closes it by itself, six hours before expiry
            pass_time(node, channel.record.expiry - 2 * 3600)
            wait_for(lambda: node.rpc("getmempoolentry", txid)["fees"]["descendant"] * 100_000_000 > 80_000, "pushed")
            wait_for(lambda: pinned() == [], "no alarm")
            assert len(node.rpc("getrawmempool")) == 2
            node.mine(3)
            for outpoint in (withdrawn, moved_to):
                wait_for(lambda outpoint=outpoint: system.channel(outpoint)["status"] == "closed", "closed")  # type: ignore[misc]
            assert system.channel(withdrawn)["settlement_txid"] == txid
