"""Messages to the application about channels on a real chain: a settlement, a withdrawal, a loss, a reorganization."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.test_regtest_refund import mine_empty_until
from tests.lib.application import Application
from tests.lib.customer import OPENING_SAT, Customer, Mover, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Place = tuple[System, Node, Application]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with (
        Application() as application,
        market(tmp_path, {"callback": f'url = "{application.url}"\ntimeout_seconds = 5'}) as (system, node),
    ):
        yield system, node, application


def heard(application: Application, channel: str) -> list[str]:
    return [each.body["type"] for each in application.events if each.body["channel_id"] == channel]


def test_fault_48_a_settlement_and_a_reorganization_are_told(place: Place) -> None:
    """`settled` comes at the depth that ends a channel, with the fee that the chain shows; a reorg tells `closing` again."""
    system, node, application = place
    customer = Customer(system, node)
    customer.opened()
    name = str(customer.outpoint)
    assert customer.pay(OPENING_SAT + 70_000).status_code == 200
    assert customer.close(OPENING_SAT + 70_000).status_code == 202
    wait_for(lambda: heard(application, name) == ["opened", "closing"], "closing")
    [outputs] = settled(customer)
    wait_for(lambda: heard(application, name) == ["opened", "closing", "settled"], "settled")
    end = application.events[-1].body
    assert end["txid"] == customer.record["settlement_txid"]
    assert end["received_sat"] == OPENING_SAT + 70_000
    assert end["fee_sat"] == 1_000_000 - sum(outputs.values())
    node.invalidate(2)
    node.mine_only()
    node.mine_only()
    node.mine_only()
    wait_for(lambda: heard(application, name)[3:4] == ["closing"], "closing again")
    node.mine(2)
    wait_for(lambda: heard(application, name)[4:] == ["settled"], "settled again")
    keys = [each.headers["webhook-id"] for each in application.events]
    assert len(set(keys)) == len(keys)


def test_fault_48_a_withdrawal_names_the_channel_s_next_output(place: Place) -> None:
    """The questions about the next payments have the name in `continues_at`; no message comes before them."""
    system, node, application = place
    mover = Mover(system, node)
    mover.opened()
    first = str(mover.outpoint)
    assert mover.pay(OPENING_SAT + 1).status_code == 200
    mover.withdrawn()
    wait_for(lambda: heard(application, first) == ["opened", "closing", "settled"], "settled")
    end = application.events[-1].body
    assert (end["reason"], end["continues_at"]) == ("withdraw", str(mover.outpoint))
    assert heard(application, str(mover.outpoint)) == []


def test_fault_48_a_refund_is_told_as_a_loss(place: Place) -> None:
    """`lost` names the refund."""
    system, node, application = place
    customer = Customer(system, node)
    customer.opened()
    node.pass_median_time(customer.terms.expiry.lock_time - 6 * 3600 + 60)
    wait_for(lambda: customer.record["settlement_txid"] is not None, "settlement published")
    refund = customer.refund(fee_sat=200_000)
    mine_empty_until(node, customer.terms.expiry.lock_time)
    node.mine_only(refund.transaction.hex())
    node.mine_only()
    wait_for(lambda: heard(application, str(customer.outpoint)) == ["opened", "closing", "lost"], "lost")
    closing, lost = (each.body for each in application.events[-2:])
    assert (closing["reason"], lost["reason"]) == ("expiry", "spent")
    assert (lost["txid"], lost["received_sat"]) == (refund.txid[::-1].hex(), OPENING_SAT)
