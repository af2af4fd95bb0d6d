"""The drill: a backup is taken, channels continue in every possible way, all is lost, the backup is restored.

There are two stages: the signer kept its ledger, or lost it (but not the seed: without it nothing can be settled). The
expected end of every channel is read from the chain's outputs. The table in config/README.md ("Backups") has the same
cases.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from paychan.protocol.address import decode_address
from paychan.protocol.payment import sign_payment
from paychan.protocol.types import Network, OutPoint, Sat
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, Mover, _data, market, wait_for
from tests.lib.node import Node
from tests.lib.system import System

PAYCHAN = Path(sys.executable).with_name("paychan")
HOUR = 3600
LATER_SAT = OPENING_SAT + 50_000
"""Sum that a channel has received when all is lost; the backup has the opening only."""


class OtherAddressCustomer(CustomerV2):
    """A customer that closes to another address."""

    def leaves(self, paid_sat: int) -> None:
        """Close, with the change to a new address of the node's wallet."""
        address = self.node.address()
        self.home = decode_address(address, Network.REGTEST)
        payment = sign_payment(self.key, self.terms, self.outpoint, FUNDING_SAT, self.home, Sat(FUNDING_SAT - paid_sat))
        self.closing = {"payment_data": _data(payment) | {"change_address": address}, "application_data": ""}
        self.again()

    def again(self) -> None:
        """Send the same closing (again)."""
        body = msgspec.json.encode(self.closing)
        answer = self.ask("PUT", f"{self.path}/close", body, secret=self.secret)
        assert answer.status_code in (200, 202), answer.text


class Drill:
    """One channel of each kind, through backup, later payments, loss and restoring."""

    def __init__(self, system: System, node: Node, *, ledger_lost: bool) -> None:
        self.system, self.node, self.ledger_lost = system, node, ledger_lost
        self.paid, self.closed, self.unpublished = (CustomerV2(system, node) for _ in range(3))
        self.elsewhere, self.elsewhere_unpublished = (
            OtherAddressCustomer(system, node),
            OtherAddressCustomer(system, node),
        )
        self.withdrawn, self.moved_twice = Mover(system, node), Mover(system, node)
        self.refunded = Customer(system, node, int(time.time()) + 22 * HOUR)
        self.all = (self.paid, self.closed, self.unpublished, self.elsewhere, self.elsewhere_unpublished)
        self.open((*self.all, self.withdrawn, self.moved_twice, self.refunded))
        self.backup = self.command("backup", "create", system.server_file)
        self.go_on()
        self.lose_everything()
        self.restore()

    def open(self, customers: tuple[Customer, ...]) -> None:
        for each in customers:
            each.fund()
        self.node.mine()
        for each in customers:
            wait_for(lambda each=each: each.open().status_code == 201, "opened")  # type: ignore[misc]

    def command(self, *words: object) -> Path:
        """Run an operator's command; return the backup that it names."""
        named = re.search(r"\S+\.backup", self.says(*words))
        return Path(named[0]) if named else Path()

    def says(self, *words: object) -> str:
        """Run an operator's command, and return its output."""
        done = subprocess.run(
            [PAYCHAN, *map(str, words)], capture_output=True, text=True, check=False, timeout=60, env={"COLUMNS": "400"}
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def go_on(self) -> None:
        """Continue each channel in its own way; no copy of the store has the payments after the backup."""
        for each in (*self.all, self.withdrawn, self.moved_twice):
            assert each.pay(LATER_SAT).status_code == 200
        self.moved_twice.withdrawn()
        wait_for(lambda: self.moved_twice.pay(LATER_SAT + 10_000).status_code == 200, "paying at the second output")
        self.moved_twice.withdrawn()
        wait_for(lambda: self.moved_twice.pay(LATER_SAT + 15_000).status_code == 200, "paying at the third output")
        self.withdrawn.withdrawn()
        wait_for(lambda: self.withdrawn.pay(LATER_SAT + 15_000).status_code == 200, "paying at the new output")
        assert self.closed.close(LATER_SAT).status_code in (200, 202)
        self.elsewhere.leaves(LATER_SAT)
        self.node.mine(2)
        self.closed.ends("closed")
        self.elsewhere.ends("closed")
        assert self.unpublished.close(LATER_SAT).status_code in (200, 202)
        self.elsewhere_unpublished.leaves(LATER_SAT)

    def lose_everything(self) -> None:
        """Lose store, mempool and perhaps the signer's ledger; meanwhile the refund of one channel is mined."""
        system, node = self.system, self.node
        system.kill_server()
        assert system.signer is not None
        system.signer.stop()
        node.stop()
        node.start("-persistmempool=0", "-walletbroadcast=0")
        node.set_mock_time(self.refunded.terms.expiry.lock_time + 60)
        while node.median_time <= self.refunded.terms.expiry.lock_time:
            node.mine_only()
        node.mine_only(node.send_raw(self.refunded.refund().transaction))
        node.mine_only()
        assert node.rpc("getrawmempool") == []
        shutil.rmtree(system.state / "store")
        if self.ledger_lost:
            shutil.rmtree(system.state / "signer.ledger")

    def restore(self) -> None:
        self.command("backup", "restore", self.system.server_file, self.backup)
        self.system.start_signer()
        self.system.start_server()

    # --- the state of the chain -------------------------------------------------------------------------------------------

    def spender(self, outpoint: OutPoint) -> dict[str, Any]:
        """Return the transaction in the chain that spends an output."""
        for height in range(self.node.height, 0, -1):
            block = self.node.rpc("getblock", self.node.rpc("getblockhash", height), 2)
            for transaction in block["tx"]:
                spent = [(each.get("txid"), each.get("vout")) for each in transaction["vin"]]
                if (outpoint.txid_hex, outpoint.vout) in spent:
                    found: dict[str, Any] = transaction
                    return found
        raise AssertionError(outpoint)

    def paid_to(self, outpoint: OutPoint) -> dict[str, int]:
        """Return the satoshi that the spend of an output pays to each script (by hex)."""
        outputs = self.spender(outpoint)["vout"]
        return {out["scriptPubKey"]["hex"]: int(out["value"] * 100_000_000) for out in outputs}

    def settles(self, customer: Customer) -> dict[str, int]:
        """Mine the server's transactions for a channel, and return their payouts."""
        outpoint = {"txid": customer.outpoint.txid_hex, "vout": customer.outpoint.vout}
        wait_for(
            lambda: (
                "spendingtxid" in self.node.rpc("gettxspendingprevout", [outpoint])[0]
                or customer.record["status"] == "closed"
            ),
            "settlement published",
        )
        self.node.mine(2)
        customer.ends("closed")
        return self.paid_to(customer.outpoint)

    def close(self, customer: Customer) -> dict[str, int]:
        """Let the operator close a channel, and return its payouts in the chain."""
        txid, vout = str(customer.outpoint).split(":")
        answer = self.system.manage("POST", f"/channels/{txid}/{vout}/close")
        assert answer.status_code == 200, answer.text
        return self.settles(customer)


@pytest.fixture(scope="module", params=[False, True], ids=["ledger kept", "ledger lost"])
def drill(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with market(tmp_path_factory.mktemp("drill")) as (system, node):
        yield Drill(system, node, ledger_lost=request.param)


def test_fault_11_paid_on(drill: Drill) -> None:
    """The payer's next payment includes the sum that the backup lacks: all of it is settled."""
    wait_for(lambda: drill.paid.pay(LATER_SAT + 2_000).status_code == 200, "paying")
    paid = drill.close(drill.paid)
    assert paid[drill.paid.change_script.hex()] == FUNDING_SAT - LATER_SAT - 2_000


def test_fault_12_closed(drill: Drill) -> None:
    """The settlement in the chain ends the channel, with its value."""
    drill.closed.ends("closed")
    found = drill.closed.record
    assert (found["value_received"], found["settlement_txid"]) == (
        LATER_SAT,
        drill.spender(drill.closed.outpoint)["txid"],
    )
    assert drill.paid_to(drill.closed.outpoint)[drill.closed.change_script.hex()] == FUNDING_SAT - LATER_SAT


def test_fault_12_closed_to_another_address(drill: Drill) -> None:
    """A settlement with change to an address that the backup lacks ends the channel as well."""
    drill.elsewhere.ends("closed")
    assert drill.elsewhere.record["value_received"] == LATER_SAT
    assert drill.paid_to(drill.elsewhere.outpoint)[drill.elsewhere.home.hex()] == FUNDING_SAT - LATER_SAT


def test_fault_03_closed_but_never_published(drill: Drill) -> None:
    """The signer knows the newest payment; if it lost the ledger, the payer's repeated closing has it."""
    if drill.ledger_lost:
        wait_for(lambda: drill.unpublished.close(LATER_SAT).status_code in (200, 202), "closing again")
    paid = drill.settles(drill.unpublished)
    assert paid[drill.unpublished.change_script.hex()] == FUNDING_SAT - LATER_SAT


def test_fault_04_closed_to_another_address_but_never_published(drill: Drill) -> None:
    """The signer knows the address, too; if it lost the ledger, the payer's repeated closing has it."""
    if drill.ledger_lost:
        drill.elsewhere_unpublished.again()
    paid = drill.settles(drill.elsewhere_unpublished)
    assert paid[drill.elsewhere_unpublished.home.hex()] == FUNDING_SAT - LATER_SAT


def goes_on(drill: Drill, customer: Mover) -> None:
    """The payer pays more at the channel's present output; after its closing, every satoshi is where it belongs."""
    wait_for(lambda: customer.pay(LATER_SAT + 20_000).status_code == 200, "paying")
    assert customer.record["funding_value"] == int(
        drill.node.rpc("gettxout", customer.outpoint.txid_hex, customer.outpoint.vout)["value"] * 100_000_000
    )
    paid = drill.close(customer)
    assert paid[customer.change_script.hex()] == FUNDING_SAT - LATER_SAT - 20_000


def test_fault_11_withdrawn_from(drill: Drill) -> None:
    """The withdrawal in the chain is the move: the old outpoint leads to the new one, where payments continue."""
    (first,) = drill.withdrawn.went
    wait_for(lambda: drill.system.channel(first).get("moved_to") == str(drill.withdrawn.outpoint), "moved")
    old = drill.system.channel(first)
    assert (old["status"], old["value_received"]) == ("closed", LATER_SAT)
    answer = drill.withdrawn.ask(
        "PUT", f"/v2/channels/{first.txid_hex}/{first.vout}", b"{}", secret=drill.withdrawn.secret
    )
    assert answer.status_code in (308, 400)
    goes_on(drill, drill.withdrawn)


def test_fault_11_moved_twice(drill: Drill) -> None:
    """Two consecutive withdrawals are followed; the spent output between them takes no payment."""
    first, second = drill.moved_twice.went
    wait_for(lambda: drill.system.channel(first).get("moved_to") == str(second), "moved once")
    wait_for(lambda: drill.system.channel(second).get("moved_to") == str(drill.moved_twice.outpoint), "moved twice")
    assert drill.system.channel(second)["value_received"] == 10_000
    goes_on(drill, drill.moved_twice)


def test_fault_12_refunded(drill: Drill) -> None:
    """A refunded channel is LOST, with the txid of its refund."""
    drill.refunded.ends("lost")
    assert drill.refunded.record["spent_by"] == drill.spender(drill.refunded.outpoint)["txid"]
    assert sum(drill.paid_to(drill.refunded.outpoint).values()) == FUNDING_SAT - 10_000


def test_fault_16_status_names_the_kind_of_each_alarm(drill: Drill) -> None:
    """`paychan status` names the kind of each alarm, with its own text."""
    drill.refunded.ends("lost")
    wait_for(lambda: "'lost'" in str(drill.system.manage("GET", "/health").json()["alarms"]), "alarm")
    shown = drill.says("status", drill.system.server_file)
    txid = drill.spender(drill.refunded.outpoint)["txid"]
    assert f"lost {drill.refunded.outpoint}: funding output was spent by {txid}" in shown
    assert "clock: the server's clock says" in shown
    assert "unsettled near expiry" not in shown


def test_fault_12_at_the_end_nothing_is_lost_but_the_refund(drill: Drill) -> None:
    """Only the refund's alarm is left, and no channel is open or closing."""
    kinds = [alarm["kind"] for alarm in drill.system.manage("GET", "/health").json()["alarms"]]
    assert [kind for kind in kinds if kind != "clock"] == ["lost"]  # the test moved the chain's time

    def unsettled() -> list[int]:
        channels = drill.system.manage("GET", "/totals").json()["channels"]
        return [channels[state] for state in ("open", "closing", "published", "lost")]

    wait_for(lambda: unsettled() == [0, 0, 0, 1], "the channels to end")
