"""A restored backup, and a later settlement that is in no mempool: signer, server and chain recover it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.test_settle_offline import opened, settled
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, market, wait_for
from tests.lib.node import Node
from tests.lib.system import System

PAYCHAN = Path(sys.executable).with_name("paychan")
PAID_SAT = 300_000
FLOOR_SAT_PER_VB = 90


def forget_mempool(node: Node) -> None:
    """Lose the mempool; from now on the node relays only twice the signed rate."""
    node.stop()
    node.start("-persistmempool=0", "-walletbroadcast=0", f"-minrelaytxfee={FLOOR_SAT_PER_VB / 100_000:.5f}")
    node.set_mock_time(0)


def restore(system: System, backup: Path) -> None:
    command = [PAYCHAN, "backup", "restore", system.server_file, backup]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("way", ["server", "offline"])
def test_fault_03_a_settlement_that_the_backup_lacks_is_signed_at_the_present_floor(tmp_path: Path, way: str) -> None:
    """Paid 100,000 in the backup, 300,000 at the end: the client gets 700,000 back, at a rate that the node relays."""
    with market(tmp_path) as (system, node):
        customer = opened(Customer(system, node))
        backup = Path(system.manage("POST", "/backups").json()["path"])
        assert customer.pay(PAID_SAT).status_code == 200
        assert customer.close(PAID_SAT).status_code == 202
        cheap = customer.record["settlement_txid"]
        system.kill_server()
        shutil.rmtree(system.state / "store")
        forget_mempool(node)
        if way == "server":
            restore(system, backup)
            system.start_server()
        else:
            at_floor = ("--publish", "--fee-rate", FLOOR_SAT_PER_VB)
            (fate,) = settled(backup, system.server_file, *at_floor)["channels"]
            assert (fate["outcome"], fate["received_sat"]) == ("published", PAID_SAT)
        wait_for(lambda: len(node.rpc("getrawmempool")) == 1, "settled at the floor")
        (txid,) = node.rpc("getrawmempool")
        assert txid != cheap
        transaction = node.rpc("getrawtransaction", txid, True)
        change, ours = (int(out["value"].scaleb(8)) for out in transaction["vout"])
        assert change == FUNDING_SAT - PAID_SAT
        assert PAID_SAT - ours >= FLOOR_SAT_PER_VB * transaction["vsize"]
        if way == "server":
            assert customer.record["value_received"] == PAID_SAT > OPENING_SAT
            node.mine(2)
            customer.ends("closed")
