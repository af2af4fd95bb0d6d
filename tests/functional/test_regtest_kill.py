"""Server, signer and node killed at every step of opening and closing, and under payments, on a real chain."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.lib.customer import OPENING_SAT, Customer, market, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

PAID_SAT = OPENING_SAT + 5

_LATEST_SECONDS = 0.03
"""Opening and closing take less than this on a fast machine: a kill falls anywhere into them, or just behind."""


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("kill")) as place:
        yield place


def end_server(system: System, node: Node) -> None:
    system.restart_server()


def end_signer(system: System, node: Node) -> None:
    assert system.signer is not None
    system.signer.stop(signal.SIGKILL)
    system.start_signer()


def end_node(system: System, node: Node) -> None:
    """A node killed so loses its mempool and the newest blocks that it had not written; its peers would send both."""
    blocks = [node.rpc("getblock", node.rpc("getblockhash", height), 0) for height in range(1, node.height + 1)]
    node.kill()
    node.start()
    for block in blocks[node.height :]:
        node.rpc("submitblock", block)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("end", [end_server, end_signer, end_node])
def test_threat_11_34_killed_in_opening_and_closing_everything_resumes(
    market_place: Market, end: Callable[[System, Node], None], seed: int
) -> None:
    """The payer repeats what got no answer; the channel ends CLOSED once, with all that was answered as paid."""
    system, node = market_place
    pause = random.Random(f"{end.__name__} {seed}").uniform
    customer = Customer(system, node)
    customer.fund()
    node.mine()

    def opened() -> bool:
        return customer.open().status_code in (201, 409)

    def closed() -> bool:
        return customer.close(PAID_SAT).status_code in (202, 410)

    for step in (opened, closed):
        meanwhile = threading.Thread(target=_try_once, args=(step,))
        meanwhile.start()
        time.sleep(pause(0, _LATEST_SECONDS))
        end(system, node)
        meanwhile.join()
        wait_for(lambda step=step: _try_once(step), step.__name__)  # type: ignore[misc]
        if step is opened:
            wait_for(lambda: customer.pay(PAID_SAT).status_code == 200, "paid")

    wait_for(lambda: customer.record["status"] in ("published", "closed"), "published")
    settlement = customer.record["settlement_txid"]
    wait_for(lambda: settlement in node.rpc("getrawmempool"), "in the mempool")
    node.mine(2)
    customer.ends("closed")
    record = customer.record
    assert (record["settlement_txid"], record["value_received"]) == (settlement, PAID_SAT)
    assert record["spent_by"] is None


def _try_once(step: Callable[[], bool]) -> bool:
    try:
        return step()
    except httpx.TransportError:
        return False


def test_threat_33_a_node_that_goes_and_comes_under_load_loses_no_answered_payment(market_place: Market) -> None:
    """503 while it is away, then on; the record holds exactly the newest payment that was answered with 200."""
    system, node = market_place
    customers = [Customer(system, node) for _ in range(4)]
    for each in customers:
        each.fund()
    node.mine()
    for each in customers:
        wait_for(lambda each=each: each.open().status_code == 201, "opened")  # type: ignore[misc]
    stop = threading.Event()
    seen: list[list[tuple[int, int]]] = [[] for _ in customers]

    def pay(customer: Customer, answers: list[tuple[int, int]]) -> None:
        paid_sat = OPENING_SAT
        while not stop.is_set():
            status = customer.pay(paid_sat + 1).status_code
            paid_sat += status == 200
            answers.append((status, paid_sat))

    threads = [threading.Thread(target=pay, args=pair) for pair in zip(customers, seen, strict=True)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            marks = [len(answers) for answers in seen]
            node.stop()
            wait_for(lambda: all(answers[-1][0] == 503 for answers in seen if answers), "frozen")
            node.start()
            wait_for(
                lambda marks=marks: all(  # type: ignore[misc]
                    answers[-1][0] == 200 and len(answers) > mark for answers, mark in zip(seen, marks, strict=True)
                ),
                "thawed",
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for customer, answers in zip(customers, seen, strict=True):
        assert {status for status, _ in answers} == {200, 503}
        assert customer.record["value_received"] == answers[-1][1]
