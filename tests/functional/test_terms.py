"""Faults 23 and 25 with a real node and a real signer: terms that were given out can be used for opening."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, code, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

_PRICES = "base_price_sat = 70000\nv2_price_sat = 70000"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("terms"), {"open": f"{_PRICES}\nadd_settlement_fee = false"}) as both:
        yield both


def questions(customer: Customer) -> list[httpx.Response]:
    """Request the terms in all their forms."""
    key, expiry = customer.query["client_pubkey"], customer.query["exp_time"]
    return [
        customer.ask("GET", "/v1/fundingInfo", **customer.query),
        customer.ask("GET", f"/v2/funding/{expiry}/{key}/info"),
    ]


def test_fault_25_without_node_or_signer_no_address_is_given_out(place: Market) -> None:
    """503 with Retry-After and no internal details, also for terms that were given before; then it continues by itself."""
    system, node = place
    customer = Customer(system, node)

    def away(wanted: str) -> bool:
        answers = questions(customer)
        assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 503)
        assert not any(re.search(r"127\.0\.0\.1|\.sock", answer.text) for answer in answers)
        return [code(answer) for answer in answers if answer.status_code != 200] == [(503, wanted)] * 2

    assert system.signer is not None
    system.signer.stop()
    wait_for(lambda: away("signer_unavailable"), "no address without signer")
    system.start_signer()
    wait_for(lambda: {answer.status_code for answer in questions(customer)} == {200}, "signer is back")
    node.stop()
    wait_for(lambda: away("chain_unavailable"), "no address without node")
    node.start()
    wait_for(lambda: {answer.status_code for answer in questions(customer)} == {200}, "node is back")


@pytest.mark.parametrize("kind", [Customer, CustomerV2])
def test_fault_23_terms_from_before_a_new_seed_stay_valid(place: Market, kind: type[Customer], tmp_path: Path) -> None:
    """The seed is rotated between funding and opening; server and signer are restarted."""
    system, node = place
    before = kind(system, node)
    before.fund()
    node.mine()
    program = Path(sys.executable).parent / "paychan-signer"
    rotate = [program, "rotate", "seed", system.signer_file, "--words-file", tmp_path / "words"]
    subprocess.run(rotate, check=True, capture_output=True)
    assert system.signer is not None
    system.signer.stop()
    system.start_signer()
    system.restart_server()

    after = kind(system, node)
    assert after.terms.server_key != before.terms.server_key
    assert before.open().status_code == 201
    assert before.pay(OPENING_SAT + 1).status_code == 200
    assert before.close(OPENING_SAT + 1).status_code in (200, 202)
    (mined,) = settled(before)
    assert mined[before.change_script.hex()] == FUNDING_SAT - OPENING_SAT - 1


@pytest.mark.parametrize("kind", [Customer, CustomerV2])
def test_fault_23_a_price_that_was_raised_after_the_funding_holds(place: Market, kind: type[Customer]) -> None:
    """New terms show the new price at once; a payer that funded before opens with the old one."""
    system, node = place
    customer = kind(system, node)
    customer.fund()
    node.mine()
    text = system.server_file.read_text()
    try:
        system.server_file.write_text(text.replace(_PRICES, _PRICES.replace("70000", "90000")))
        system.restart_server()
        assert {answer.json()["open_price"] for answer in questions(customer)} == {90_000}
        assert code(customer.open(69_999)) == (400, "payment_short")
        assert customer.open(70_000).status_code == 201
    finally:
        system.server_file.write_text(text)
        system.restart_server()


def test_fault_23_a_depth_raised_after_the_funding_does_not_apply(place: Market) -> None:
    """The list of outputs shows the depth of the earlier terms, with which the channel opens."""
    system, node = place
    customer = CustomerV2(system, node)
    customer.fund()
    node.mine()
    key, expiry = customer.query["client_pubkey"], customer.query["exp_time"]
    text = system.server_file.read_text()
    try:
        system.server_file.write_text(text.replace("min_confirmations = 1", "min_confirmations = 3"))
        system.restart_server()
        [output] = customer.ask("GET", f"/v2/funding/{expiry}/{key}/outputs").json()["outputs"]
        assert (output["confirmations"], output["confirmations_needed"]) == (1, 1)
        assert customer.open().status_code == 201
    finally:
        system.server_file.write_text(text)
        system.restart_server()
