"""Server, signer and node killed at random moments of opening and closing, and a node that restarts during payments."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

import httpx
import pytest

from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System, dead_node, dead_server, dead_signer, write_chain

Market = tuple[System, Node]
Death = Callable[[System, Node], AbstractContextManager[None]]

PAID_SAT = OPENING_SAT + 5

_LATEST_SECONDS = 0.03
"""Opening and closing take less than this on a fast machine: a kill falls into them, or shortly after."""


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("kill")) as place:
        write_chain(place[1])
        yield place


@pytest.mark.parametrize("death", [dead_server, dead_signer, dead_node])
def test_threat_11_34_killed_in_opening_and_closing_everything_resumes(market_place: Market, death: Death) -> None:
    """At any moment, in both versions: the payer repeats unanswered requests; the channels end CLOSED once, all paid."""
    system, node = market_place
    pause = random.Random(death.__name__).uniform
    customers = [Customer(system, node), CustomerV2(system, node)]
    for each in customers:
        each.fund()
    node.mine()
    for step in (opened, closed):
        with ThreadPoolExecutor(len(customers)) as threads:
            for each in customers:
                threads.submit(once, step, each)
            time.sleep(pause(0, _LATEST_SECONDS))
            with death(system, node):
                pass
        for each in customers:
            wait_for(partial(once, step, each), step.__name__)
            if step is opened:
                wait_for(partial(once, paid, each), "paid")

    for each, mined in zip(customers, settled(*customers), strict=True):
        assert mined[each.change_script.hex()] == FUNDING_SAT - PAID_SAT
        assert (each.record["value_received"], each.record["spent_by"]) == (PAID_SAT, None)


def opened(customer: Customer) -> bool:
    return customer.open().status_code in (201, 409)


def paid(customer: Customer) -> bool:
    return customer.pay(PAID_SAT).status_code == 200


def closed(customer: Customer) -> bool:
    return customer.close(PAID_SAT).status_code in (200, 202, 410)


def once(step: Callable[[Customer], bool], customer: Customer) -> bool:
    """Try a step, and say whether it is done; the server may not answer."""
    try:
        return step(customer)
    except httpx.TransportError:
        return False


def test_threat_33_a_restarted_node_loses_no_acknowledged_payment(market_place: Market) -> None:
    """503 while it is stopped, then 200; the record holds exactly the newest payment that was answered with 200."""
    system, node = market_place
    customers = [kind(system, node) for kind in (Customer, CustomerV2, Customer, CustomerV2)]
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
