"""A backup taken while customers pay: it holds one moment, and its channels can be settled."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import httpx
from bitcoin.core import CTransaction

from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT
from paychan.protocol.types import OutPoint
from paychan.store.backup.create import verify
from tests.lib.kernel import interpreter_accepts
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

OPENING_SAT = 100_000
CUSTOMERS = 4


class Customer(threading.Thread):
    """Pays one satoshi after another over one channel, and records the acknowledged sum."""

    def __init__(self, url: str, stop: threading.Event) -> None:
        super().__init__()
        self.payer = Payer()
        self.paid_sat = 0
        self._url = url
        self._stop_paying = stop
        self.first_paid = threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=30, verify=False) as http:
            channel = V1(self._url, self.payer, http)
            assert channel.open(self.payer.payment(OPENING_SAT)).status_code == 201
            self.paid_sat = OPENING_SAT
            while not self._stop_paying.is_set():
                assert channel.pay(self.payer.payment(self.paid_sat + 1)).status_code == 200
                self.paid_sat += 1
                self.first_paid.set()


def paychan(*arguments: str) -> str:
    """Run the command as an operator does."""
    program = Path(sys.executable).parent / "paychan"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def backed_up(system: System, customers: list[Customer], stop: threading.Event) -> tuple[Path, list[int], list[int]]:
    """Take a backup while all customers pay; return each customer's acknowledged sum before it, and after it."""
    for customer in customers:
        customer.start()
        assert customer.first_paid.wait(30)
    before = [customer.paid_sat for customer in customers]
    reply = system.manage("POST", "/backups")
    after = [customer.paid_sat + 1 for customer in customers]  # one more may be stored but not yet acknowledged
    stop.set()
    for customer in customers:
        customer.join(30)
    assert reply.status_code == 201
    return Path(reply.json()["path"]), before, after


def test_threat_12_a_backup_under_load_settles_every_channel_in_it(tmp_path: Path) -> None:
    """A backup taken during payments holds the records of that moment, and a restored server settles them."""
    stop = threading.Event()
    with System(tmp_path / "first") as system:
        customers = [Customer(system.url, stop) for _ in range(CUSTOMERS)]
        path, before, after = backed_up(system, customers, stop)
        assert all(customer.paid_sat >= least for customer, least in zip(customers, before, strict=True))

    assert verify(path).states["open"] == CUSTOMERS
    restored = System(tmp_path / "second")
    paychan("backup", "restore", str(restored.server_file), str(path))
    with restored:
        for customer, least, most in zip(customers, before, after, strict=True):
            outpoint: OutPoint = customer.payer.outpoint
            found = restored.channel(outpoint)
            assert least <= found["value_received"] <= most
            closed = restored.manage("POST", f"/channels/{outpoint.txid_hex}/{outpoint.vout}/close").json()
            transaction = bytes.fromhex(closed["settlement_transaction"])
            assert interpreter_accepts(customer.payer.terms.funding_script, transaction, 0, DEBUG_FUNDING_SAT)
            paid = [out.nValue for out in CTransaction.deserialize(transaction).vout]
            assert paid == [
                DEBUG_FUNDING_SAT - found["value_received"],
                found["value_received"] - closed["settlement_fee"],
            ]
