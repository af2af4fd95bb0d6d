"""Problems of the node: clocks that differ, an old tip, and a node that is unfit."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from paychan.running import read_running
from tests.lib.customer import OPENING_SAT, Customer, CustomerV2, code, wait_for
from tests.lib.node import Node
from tests.lib.system import System

HOUR_SECONDS = 3600


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node whose newest block is a hundred minutes old."""
    born = int(time.time()) - 6000
    with Node(tmp_path_factory.mktemp("node"), born=born) as node:
        yield node


def changed(directory: Path, node: Node, old: str, new: str) -> System:
    """A paychan, not started yet, with one line of the server's settings changed."""
    system = System(directory / "system", node=node)
    text = system.server_file.read_text()
    assert old in text
    system.server_file.write_text(text.replace(old, new))
    return system


def test_threat_33_an_old_tip_stops_payments_until_a_block_comes(tmp_path: Path, node: Node) -> None:
    """503 with the age as the reason, before an address is given out; after a fresh block everything continues."""
    with changed(tmp_path, node, "stale_tip_minutes = 0", "stale_tip_minutes = 60") as system:
        health = system.manage("GET", "/health")
        assert health.status_code == 503
        assert "minutes old, limit 60" in health.json()["frozen"][0]
        assert health.json()["frozen"][0] in [alarm["text"] for alarm in health.json()["alarms"]]
        with pytest.raises(AssertionError, match="chain_unavailable"):
            Customer(system, node)

        node.set_mock_time(0)
        node.mine()
        wait_for(lambda: system.manage("GET", "/health").status_code == 200, "thawed")
        time.sleep(1.1)  # the answers to unauthenticated requests are cached for a second
        customer = Customer(system, node)
        customer.opened()
        assert customer.pay(OPENING_SAT + 1).status_code == 200


def test_threat_6_a_chain_ahead_of_the_clock_raises_an_alarm(tmp_path: Path, node: Node) -> None:
    """A block three hours ahead raises an alarm; once the median time is ahead, it decides, and openings are refused."""
    with System(tmp_path / "system", node=node) as system:
        now = int(time.time())
        customer = CustomerV2(system, node, expiry=now + 20 * HOUR_SECONDS)

        def info(hours: int) -> httpx.Response:
            path = f"/v2/funding/{now + hours * HOUR_SECONDS}/{customer.query['client_pubkey']}/info"
            return customer.ask("GET", path)

        assert code(info(17))[1] == "expiry_too_soon"
        assert info(20).status_code == 200
        customer.fund()

        node.set_mock_time(now + 3 * HOUR_SECONDS)
        node.mine()
        wait_for(lambda: "the clock is behind" in str(system.manage("GET", "/health").json()["alarms"]), "alarm")
        node.pass_median_time(now + 2 * HOUR_SECONDS)
        wait_for(lambda: info(20).status_code != 200, "the median time seen")
        assert code(info(20))[1] == "expiry_too_soon"
        assert code(customer.open())[1] == "expiry_too_soon"


@pytest.mark.parametrize(
    ("old", "new", "advice"),
    [
        ("credentials_file = ", 'credentials_file = "{wrong}" # ', "credentials"),
        ("url = ", 'url = "http://127.0.0.1:1" # ', "127.0.0.1:1"),
    ],
    ids=["wrong credentials", "no listener there"],
)
def test_threat_33_no_payments_with_a_node_that_is_unfit(
    tmp_path: Path, node: Node, old: str, new: str, advice: str
) -> None:
    """The server starts, gives out no address, and names the problem."""
    wrong = tmp_path / "wrong"
    wrong.write_text("nobody:nothing\n")
    with changed(tmp_path, node, old, new.format(wrong=wrong)) as system:
        health = system.manage("GET", "/health")
        assert health.status_code == 503
        assert advice in health.json()["frozen"][0]
        with pytest.raises(AssertionError, match="chain_unavailable"):
            Customer(system, node)
    assert system.server is not None
    assert "Traceback" not in system.server.text()


def test_threat_33_no_start_with_a_node_of_another_network(tmp_path: Path, node: Node) -> None:
    """Exit status 2 with the setting to correct, before any port is open."""
    old, new = 'network = "regtest"', 'network = "test"'
    system = changed(tmp_path, node, old, new)
    system.signer_file.write_text(system.signer_file.read_text().replace(old, new))
    with contextlib.ExitStack() as stack:
        stack.callback(system.__exit__, None, None, None)
        system.start_signer()
        with pytest.raises(AssertionError, match="server did not start"):
            system.start_server()
    assert system.server is not None
    assert system.server.stop() == 2
    assert "Correct chain.url or network" in system.server.text()
    assert "Traceback" not in system.server.text()
    assert read_running(system.state) is None


def test_threat_33_a_lost_watch_only_wallet_is_replaced(tmp_path: Path) -> None:
    """Server and wallet were down while a refund was mined: a new wallet is rescanned, and the loss is found and named."""
    with Node(tmp_path / "node") as node, System(tmp_path / "system", node=node) as system:
        customer = Customer(system, node)
        customer.opened()
        system.kill_server()
        node.rpc("unloadwallet", "paychan")
        (directory,) = node.directory.glob("**/paychan")
        shutil.rmtree(directory)
        node.pass_median_time(customer.terms.expiry.lock_time)
        txid = node.send_raw(customer.refund().transaction)
        node.mine(3)

        system.start_server()
        customer.ends("lost")
        assert customer.record["spent_by"] == txid
