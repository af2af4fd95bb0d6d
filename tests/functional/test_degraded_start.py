"""The server starts without node and signer, in any order, names its missing parts, and completes its start by itself."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from tests.functional.test_start import fill, payer
from tests.lib.customer import OPENING_SAT, Customer, code, wait_for
from tests.lib.node import Node
from tests.lib.system import Daemon, System

PARTS = ("node", "signer", "server")


class Deployment:
    """A regtest node, and signer and server on one state directory; each can be started and stopped alone."""

    def __init__(self, directory: Path) -> None:
        self.node = Node(directory / "node")
        self.directory = directory

    def __enter__(self) -> Self:
        self.node.__enter__()
        self.system = System(self.directory / "system", node=self.node)
        self.system.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.system.__exit__(None, None, None)
        self.node.__exit__()

    def stop(self) -> None:
        """Stop all three."""
        for daemon in (self.system.server, self.system.signer):
            assert daemon is not None
            assert daemon.stop() == 0
        self.node.stop()

    def start(self, part: str) -> None:
        {"node": self.node.start, "signer": self.system.start_signer, "server": self.system.start_server}[part]()

    def health(self) -> httpx.Response:
        return self.system.manage("GET", "/health")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)), ids="-".join)
def test_fault_26_parts_may_start_in_any_order(deployment: Deployment, order: tuple[str, ...]) -> None:
    """Whichever starts first, the server answers at once: 503 naming the missing part; in the end everything works."""
    customer = Customer(deployment.system, deployment.node)
    customer.opened()
    assert customer.close(OPENING_SAT).status_code == 202
    payer = Customer(deployment.system, deployment.node)
    payer.opened()
    deployment.stop()
    there: set[str] = set()
    for part in order:
        deployment.start(part)
        there.add(part)
        if "server" in there:
            check_what_is_missing(deployment, payer, there)
    wait_for(lambda: deployment.health().status_code == 200, "complete")
    wait_for(lambda: payer.pay(OPENING_SAT + 10).status_code == 200, "payments resume")
    deployment.node.mine(2)
    customer.ends("closed")
    # the server asks the signer at most once a second whether it is ready for new channels
    wait_for(lambda: payer.ask("GET", "/v1/fundingInfo", **payer.query).status_code == 200, "openings resume")
    newcomer = Customer(deployment.system, deployment.node)
    newcomer.opened()
    health = deployment.health().json()
    assert [task for task in health["tasks"] if task["restarts"]] == []
    assert health["alarms"] == []


def check_what_is_missing(deployment: Deployment, payer: Customer, there: set[str]) -> None:
    health = deployment.health()
    if "signer" not in there:
        assert health.json()["signer"].startswith("absent")
    paid = payer.pay(OPENING_SAT + 1)
    if "node" not in there:
        assert health.status_code == 503
        assert code(paid) == (503, "chain_unavailable")
        assert paid.headers["Retry-After"]
    asked = payer.ask("GET", "/v1/fundingInfo", **payer.query)
    if there != set(PARTS):
        assert asked.status_code in (200, 503)
        assert asked.status_code == 200 or code(asked)[1] in ("chain_unavailable", "signer_unavailable")


def test_fault_26_a_node_in_initial_download_or_warming_up(tmp_path: Path) -> None:
    """While the node is days behind, the server answers 503 with the reason; once it has caught up, payments continue."""
    born = int(time.time()) - 3 * 86_400
    with Node(tmp_path / "node", born=born) as node:
        node.stop()
        node.start()  # its newest block is three days old
        assert node.rpc("getblockchaininfo")["initialblockdownload"] is True
        with System(tmp_path / "system", node=node) as system:
            health = system.manage("GET", "/health")
            assert health.status_code == 503
            assert "initial block download" in health.json()["frozen"][0]
            node.mine()
            wait_for(lambda: system.manage("GET", "/health").status_code == 200, "caught up")


def unknown() -> dict[str, str]:
    point = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"
    return {"client_pubkey": point, "exp_time": str(int(time.time()) + 40 * 3600)}


def test_fault_26_due_channels_are_settled_when_the_signer_starts(tmp_path: Path) -> None:
    """A server without a signer settles overdue channels as soon as the signer starts, long before the next scan."""
    system = System(tmp_path, sections={"watcher": "interval_seconds = 3000"})
    due = payer("due", 5)
    asyncio.run(fill(system.state / "store", [due.channel()]))
    try:
        system.start_server()
        assert system.channel(due.outpoint)["status"] in ("open", "closing")
        assert system.manage("GET", "/health").json()["signer"].startswith("absent")
        system.start_signer()
        wait_for(lambda: system.channel(due.outpoint)["status"] == "closed", "settled")
    finally:
        system.__exit__(None, None, None)


def test_fault_26_another_network_is_an_error(tmp_path: Path) -> None:
    """A node of another network ends the start with status 2, also if it starts after the server."""
    with Node(tmp_path / "node") as node:
        wrong = System(tmp_path / "system", node=node, sections={"http": ""})
        text = wrong.server_file.read_text().replace('network = "regtest"', 'network = "live"')
        wrong.server_file.write_text(text)
        node.stop()
        server = Daemon(tmp_path / "log", "paychan", "serve", str(wrong.server_file))
        wait_until(lambda: "serving" in server.text(), server)
        node.start()
        assert server.process.wait(30) == 2
        assert 'node of "regtest", expected main' in server.text()
        assert "Traceback" not in server.text()


def test_fault_26_a_signer_of_another_network_is_refused_later(tmp_path: Path) -> None:
    """After the first contact, a signer of another network is refused; the server waits for the right one."""
    system = System(tmp_path)
    try:
        system.start_signer()
        system.start_server()
        right = system.signer_file.read_text()
        assert system.signer is not None
        system.signer.stop()
        wrong = right.replace('network = "test"', 'network = "regtest"').replace("debug = true\n", "")
        wrong = wrong.replace('mode = "debug"', 'mode = "hardened"\ncreate_if_missing = true')
        wrong = "\n".join(line for line in wrong.splitlines() if "destination" not in line)
        elsewhere = wrong.replace(f'state_dir = "{system.state}"', f'state_dir = "{tmp_path}/other"')
        system.signer_file.write_text(f'{elsewhere}\n[socket]\npath = "{system.state}/signer.sock"\n')
        system.start_signer()
        key_mode = lambda: system.manage("GET", "/health").json()["signer"]  # noqa: E731
        wait_for(lambda: "serves regtest" in key_mode(), "refused")
        assert httpx.get(f"{system.url}/v1/fundingInfo", params=unknown(), timeout=30, verify=False).status_code == 503
        assert system.server is not None
        assert system.server.process.poll() is None
        system.signer.stop()
        system.signer_file.write_text(right)
        system.start_signer()
        wait_for(lambda: key_mode() == "debug", "the right one is back")
    finally:
        system.__exit__(None, None, None)


def wait_until(true: Callable[[], Any], server: Daemon) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert server.process.poll() is None, server.text()
        assert time.monotonic() < deadline, server.text()
        time.sleep(0.05)
