"""Payments and a closing at the same time, on a real channel: the mined sum is exactly the answered one (threat 35)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, code, market, settled
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

PAYERS = 6
BEFORE = 30
"""Number of payments that are answered before the closing starts; others are still in flight."""


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("race")) as place:
        yield place


class Race:
    """Payers that pay over one channel as fast as possible, and a closing; `counted` are the sums answered with 200."""

    def __init__(self, customer: Customer) -> None:
        self.customer = customer
        self.counted = [OPENING_SAT]
        self.ends: set[tuple[int, str]] = set()
        self._amounts = itertools.count(OPENING_SAT + 1)
        self._under_way = threading.Event()

    def run(self, close: Callable[[Race], None]) -> None:
        with ThreadPoolExecutor(PAYERS + 1) as threads:
            work = [threads.submit(self._pay) for _ in range(PAYERS)]
            work.append(threads.submit(self._close, close))
            for each in work:
                each.result()

    def next_amount(self) -> int:
        return next(self._amounts)

    def _pay(self) -> None:
        while True:
            paid_sat = self.next_amount()
            answer = self.customer.pay(paid_sat)
            if answer.status_code == 200:
                self.counted.append(paid_sat)
            elif answer.status_code == 410:
                self.ends.add(code(answer))
                return
            else:  # a larger payment was faster
                assert code(answer) == (400, "value_backwards")
            if len(self.counted) > BEFORE:
                self._under_way.set()

    def _close(self, close: Callable[[Race], None]) -> None:
        assert self._under_way.wait(60)
        close(self)


def by_operator(race: Race) -> None:
    outpoint = race.customer.outpoint
    closed = race.customer.system.manage("POST", f"/channels/{outpoint.txid_hex}/{outpoint.vout}/close")
    assert closed.status_code == 200


def by_payer(race: Race) -> None:
    """v1 sends the newest payment, v2 pays once more; a closing that comes too late for that tries again."""
    while True:
        paid_sat = max(race.counted) if type(race.customer) is Customer else race.next_amount()
        answer = race.customer.close(paid_sat)
        if answer.status_code in (200, 202):
            race.counted.append(paid_sat)
            return
        assert code(answer) in [(400, "not_newest_payment"), (400, "value_backwards")]


def by_draining(race: Race) -> None:
    """Pay the whole channel, which closes it."""
    answer: httpx.Response = race.customer.pay(FUNDING_SAT)
    assert answer.status_code in (200, 202)
    race.counted.append(FUNDING_SAT)


REASONS = {by_operator: "operator", by_payer: "client", by_draining: "drained"}


@pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])
@pytest.mark.parametrize("close", REASONS)
def test_threat_35_the_newest_answered_payment_is_mined(
    market_place: Market, kind: type[Customer], close: Callable[[Race], None]
) -> None:
    """Every answered payment is in the settlement, and no refused one."""
    customer = kind(*market_place)
    customer.opened()
    race = Race(customer)
    race.run(close)

    assert race.ends <= {(410, "channel_closing"), (410, "channel_closed")}
    newest = max(race.counted)
    (mined,) = settled(customer)
    record = customer.record
    assert mined.get(customer.change_script.hex(), 0) == FUNDING_SAT - newest
    assert sum(mined.values()) == FUNDING_SAT - record["settlement_fee"]
    assert (record["value_received"], record["close_reason"]) == (newest, REASONS[close])
    assert code(customer.pay(newest)) == (410, "channel_closed")
