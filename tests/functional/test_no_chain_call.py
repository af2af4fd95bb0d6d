"""A payment makes no chain call: a proxy in front of a real bitcoind counts them; also bench/payments.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.customer import OPENING_SAT, Customer, CustomerV2, code, wait_for
from tests.lib.node import Node
from tests.lib.rpcproxy import RpcProxy
from tests.lib.system import System

PAYMENTS = 50
OTHERS = PAYMENTS // 10
"""Calls of tasks that are independent of payments, such as the one that searches for deposits."""
BENCH = Path(__file__).parents[2] / "bench" / "payments.py"


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast path", "handlers"])
def market(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[System, Node, RpcProxy]]:
    """A paychan that reaches its node through the proxy, with a timeout longer than any test."""
    directory = tmp_path_factory.mktemp("market")
    sections = {"chain": "timeout_seconds = 60", "http": f"fast_lane = {request.param}"}
    with Node(directory / "node") as node, RpcProxy(node) as proxy:
        system = System(directory / "system", sections=sections, node=node)
        system.server_file.write_text(system.server_file.read_text().replace(node.url, proxy.url))
        with system:
            yield system, node, proxy


@pytest.fixture(params=[Customer, CustomerV2], ids=["v1", "v2"])
def customer(request: pytest.FixtureRequest, market: tuple[System, Node, RpcProxy]) -> Customer:
    system, node, _ = market
    customer: Customer = request.param(system, node)
    customer.opened()
    return customer


def calls_of_payments(customer: Customer, proxy: RpcProxy) -> list[str]:
    """Make many payments, and many refused ones; return the node's calls besides the watcher's one."""
    with proxy.one_waits():
        before = len(proxy.calls)
        for paid_sat in range(OPENING_SAT + 1, OPENING_SAT + 1 + PAYMENTS):
            assert customer.pay(paid_sat).status_code == 200
            assert code(customer.pay(OPENING_SAT)) == (400, "value_backwards")
        return proxy.calls[before:]


def test_payments_make_no_chain_call(market: tuple[System, Node, RpcProxy], customer: Customer) -> None:
    """While the watcher waits for the node, a hundred payments cost no call; other tasks may make a few."""
    _, _, proxy = market
    assert len(calls_of_payments(customer, proxy)) <= OTHERS
    assert customer.record["value_received"] == OPENING_SAT + PAYMENTS


def test_waking_a_channel_makes_no_chain_call(market: tuple[System, Node, RpcProxy], customer: Customer) -> None:
    """The first payment after a start wakes the channel from the store, and makes no chain call either."""
    system, _, proxy = market
    system.restart_server()
    wait_for(lambda: system.manage("GET", "/health").json()["awake"] == 0, "started")
    assert len(calls_of_payments(customer, proxy)) <= OTHERS


@pytest.mark.parametrize("version", [1, 2])
def test_the_bench_loads_real_channels(market: tuple[System, Node, RpcProxy], version: int) -> None:
    """bench/payments.py --node: 2 clients get real outputs, open, pay 50 times each, and their channels are settled."""
    system, node, _ = market
    where = [system.url.removeprefix("http://"), "--node", node.url, "--credentials", node.credentials]
    command = [sys.executable, BENCH, "50", "2", *where, "--version", str(version), "--no-save"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Done. Executed 100 payments. Funding: regtest node." in done.stdout
    assert node.rpc("getmempoolinfo")["size"] == 2
