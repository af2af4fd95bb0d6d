"""A node that replaces nothing but what signals it: settlements get their fees by children of our own output."""

from __future__ import annotations

import time
from pathlib import Path

from tests.functional.test_regtest_fees import HOUR, market, pass_time, settling, waiting
from tests.lib.customer import wait_for
from tests.lib.node import Node


def rate(node: Node) -> float:
    """Satoshi per virtual byte of all that waits: the parent and its child."""
    entries = node.rpc("getrawmempool", True).values()
    return float(sum(each["fees"]["base"] for each in entries) * 100_000_000 / sum(each["vsize"] for each in entries))


def test_fault_02_a_node_without_full_rbf_gets_a_child(tmp_path: Path) -> None:
    """As the deadline nears the settlement stays, a child pays and is replaced itself; record and alarm say what is so."""
    with market(tmp_path, "-mempoolfullrbf=0", sections={"settlement": "max_fee_percent = 100"}) as (system, node):
        customer = settling(system, node)
        (first,) = waiting(node)
        alarms = system.manage("GET", "/health").json()["alarms"]
        assert any("replaces only transactions that signal it" in str(each) for each in alarms)
        begun, deadline = max(int(time.time()), node.median_time), customer.terms.expiry - 2 * HOUR
        rates = [rate(node)]
        for tenth in (7, 9):
            pass_time(node, begun + (deadline - begun) * tenth // 10)
            wait_for(lambda last=rates[-1]: rate(node) > last * 1.2, f"pushed at {tenth} tenths")  # type: ignore[misc]
            rates.append(rate(node))
            assert len(waiting(node)) == 2
            assert first in waiting(node)
            record = customer.record
            assert (record["settlement_txid"], record["settlement_fee"]) == (first, waiting(node)[first])
        assert rates[-1] > 90
        node.mine(2)
        customer.ends("closed")
        assert customer.record["settlement_txid"] == first
