"""The required depth of a funding output, by its value, and the limit of funding without confirmations (threat 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest

from paychan.protocol.channel import Depth
from paychan.protocol.payment import Payment, sign_payment
from paychan.protocol.types import OutPoint, Sat
from tests.lib.channels import RULES
from tests.lib.customer import OPENING_SAT, Customer, CustomerV2, code, market, wait_for
from tests.lib.node import Node
from tests.lib.system import System

OPEN = """
smaller = [{ up_to_sat = 500000, confirmations = 0 }]
unconfirmed_limit_sat = 600000
"""


@pytest.fixture(scope="module")
def careful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Node]]:
    """A server that opens small channels at once: up to 600,000 satoshi of them together."""
    directory: Path = tmp_path_factory.mktemp("depth")
    with market(directory, {"open": OPEN}) as both:
        yield both


class Sized(Customer):
    """A customer with a channel of any size."""

    def fund(self, sat: int) -> OutPoint:
        self.funding_sat = sat
        return super().fund(sat)

    def payment(self, paid_sat: int) -> Payment:
        change = Sat(self.funding_sat - paid_sat)
        return sign_payment(self.key, self.terms, self.outpoint, Sat(self.funding_sat), self.change_script, change)


class SizedV2(CustomerV2, Sized):
    """A sized customer of version 2."""


def funded(both: tuple[System, Node], sat: int) -> Sized:
    customer = Sized(*both)
    customer.fund(sat)
    return customer


def test_threat_1_unconfirmed_funding_has_a_limit(careful: tuple[System, Node]) -> None:
    """A small channel opens at once; the next one over the limit waits for a block, also after a restart."""
    system, node = careful
    first, second = funded(careful, 400_000), funded(careful, 400_000)

    assert first.open().status_code == 201
    assert first.pay(OPENING_SAT + 1).status_code == 200
    assert code(second.open()) == (400, "too_much_unconfirmed")
    system.restart_server()
    assert code(second.open()) == (400, "too_much_unconfirmed")
    node.mine()
    wait_for(lambda: second.open().status_code == 201, "opened")


def test_threat_1_a_replaced_funding_without_a_confirmation_takes_no_payment(careful: tuple[System, Node]) -> None:
    """The payer double-spends before the block: the channel freezes, and its value counts no longer towards the limit."""
    system, node = careful
    node.mine()
    customer = funded(careful, 400_000)
    assert customer.open().status_code == 201
    node.replace(customer.outpoint)

    wait_for(lambda: customer.pay(OPENING_SAT + 1).status_code == 503, "frozen")
    in_danger = system.manage("GET", "/health").json()["channels_in_danger"]
    assert in_danger[str(customer.outpoint)] == "its funding output is gone"
    node.mine()
    again = funded(careful, 500_000)
    wait_for(lambda: again.open().status_code == 201, "opened")
    assert system.server is not None


def test_fault_01_openings_sent_twice_at_once_keep_the_limit(careful: tuple[System, Node]) -> None:
    """Twelve channels, each opened three times at once by both versions: four fit the limit, four open."""
    _, node = careful
    node.mine()
    customers = [funded(careful, 150_000) for _ in range(12)]

    def openings(customer: Sized) -> list[Callable[[], httpx.Response]]:
        second = object.__new__(SizedV2)
        second.__dict__.update(customer.__dict__)
        return [customer.open, customer.open, second.open]

    with ThreadPoolExecutor(18) as pool:
        requests = [each for customer in customers for each in openings(customer)]
        answers = list(pool.map(lambda request: request(), requests))
    accepted = [answer for answer in answers if answer.status_code == 201]
    assert len(accepted) == 4, [answer.text for answer in answers]
    again = funded(careful, 150_000)
    for _ in range(5):  # during this, the watcher scans after every change of the mempool
        assert code(again.open()) == (400, "too_much_unconfirmed")
        time.sleep(0.3)
    node.mine()
    wait_for(lambda: again.open().status_code == 201, "opened")


def test_threat_1_more_money_needs_more_depth(careful: tuple[System, Node]) -> None:
    """For one satoshi above the last row of the table, the general depth applies."""
    _, node = careful
    customer = funded(careful, 500_001)
    refused = customer.open()
    assert code(refused) == (400, "funding_unconfirmed")
    assert (refused.json()["got"], refused.json()["need"]) == (0, 1)
    node.mine()
    wait_for(lambda: customer.open().status_code == 201, "opened")


@pytest.mark.parametrize(
    ("sat", "need"),
    [(1, 0), (100_000, 0), (100_001, 1), (1_000_000, 1), (1_000_001, 3), (2_000_000, 3), (2_000_001, 6)],
)
def test_threat_1_the_first_row_that_holds_a_value_decides(sat: int, need: int) -> None:
    """Depth by value, up to and including each row's amount."""
    table = (Depth(Sat(100_000), 0), Depth(Sat(1_000_000), 1), Depth(Sat(2_000_000), 3))
    rules = msgspec.structs.replace(RULES, min_confirmations=6, smaller=table)

    assert rules.confirmations_needed(Sat(sat)) == need
