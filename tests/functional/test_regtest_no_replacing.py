"""A node that replaces only signalling transactions: settlements get their fees by children of the server's output."""

from __future__ import annotations

import time
from pathlib import Path

from tests.functional.test_regtest_fees import BUDGET_SAT, HOUR, market, pass_time, settling, waiting
from tests.lib.crowdedmempool import CrowdedMempool
from tests.lib.customer import OPENING_SAT, Customer, wait_for
from tests.lib.node import Node
from tests.lib.system import dead_signer


def rate(node: Node) -> float:
    """Return the satoshi per virtual byte of the mempool: the parent and its child."""
    entries = node.rpc("getrawmempool", True).values()
    return float(sum(each["fees"]["base"] for each in entries) * 100_000_000 / sum(each["vsize"] for each in entries))


def test_fault_02_a_node_without_full_rbf_gets_a_child(tmp_path: Path) -> None:
    """Towards the deadline the settlement stays; a child pays and is replaced itself; record and alarm say so."""
    with market(tmp_path, "-mempoolfullrbf=0", sections={"settlement": "max_fee_percent = 100"}) as (system, node):
        customer = settling(system, node)
        (first,) = waiting(node)
        alarms = system.manage("GET", "/health").json()["alarms"]
        assert any("replaces only transactions that signal it" in str(each) for each in alarms)
        begun, deadline = max(int(time.time()), node.median_time), customer.terms.expiry.lock_time - 2 * HOUR
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


def test_fault_09_a_child_pays_at_most_the_signers_limit(tmp_path: Path) -> None:
    """At 180 sat/vB, eight hours before expiry, the server would exceed the share, but the signer does not: it pays the share."""
    sections = {
        "open": "min_duration_hours = 9",
        "channel": "settlement_period_hours = 9",
        "settlement": "margin_hours = 8",
    }
    with market(tmp_path, "-mempoolfullrbf=0", sections=sections) as (system, node):
        crowd = CrowdedMempool(node)
        customer = Customer(system, node, int(time.time()) + 20 * HOUR)
        customer.opened()
        assert customer.close(OPENING_SAT).status_code == 202
        (first,) = waiting(node)
        with dead_signer(system, node):
            pass_time(node, customer.terms.expiry.lock_time - 8 * HOUR)
            crowd.teach(180)
            estimate = lambda: system.manage("GET", "/totals").json()["fee_estimate_sat_per_vb"]  # noqa: E731
            wait_for(lambda: (estimate() or 0) > 150, "an estimate")
        wait_for(lambda: len(waiting(node)) == 2, "pushed")
        assert first in waiting(node)
        assert sum(waiting(node).values()) == BUDGET_SAT
        node.mine(2)
        customer.ends("closed")
