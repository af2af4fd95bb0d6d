"""Requests for terms by anonymous clients leave nothing in a real node, and honest payers get answers meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from coincurve import PrivateKey

from paychan.protocol.wire import bip70
from tests.lib.customer import LIFE_SECONDS, OPENING_SAT, Customer, CustomerV2, code, market, wait_for
from tests.lib.node import Node
from tests.lib.system import System

Market = tuple[System, Node]

CLIENT = httpx.Client(timeout=60, trust_env=False, verify=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("strangers")) as both, CLIENT:
        yield both


def descriptors(node: Node) -> set[str]:
    """Return the number of descriptors in all wallets of the node except the miner's."""
    names = [name for name in node.rpc("listwallets") if name != "miner"]
    return {each["desc"] for name in names for each in node.rpc("listdescriptors", wallet=name)["descriptors"]}


def questions(system: System, number: int) -> list[tuple[str, dict[str, str]]]:
    """Build requests with a fresh key each: terms of both versions, as BIP70, and outputs of an unused address."""
    asked = []
    for n in range(number):
        key, expiry = PrivateKey().public_key.format().hex(), int(time.time()) + LIFE_SECONDS + n
        asked += [
            (f"/v1/fundingInfo?client_pubkey={key}&exp_time={expiry}", {}),
            (f"/v2/funding/{expiry}/{key}/info", {}),
            (f"/v2/funding/{key}/{expiry}/info", {"Accept": bip70.CONTENT_TYPE}),
            (f"/v2/funding/{expiry + 1}/{key}/outputs", {}),
        ]
    return [(system.url + path, headers) for path, headers in asked]


def test_fault_33_asking_for_terms_leaves_nothing_in_the_node(place: Market) -> None:
    """Two hundred requests of every kind: the node's wallets follow the same descriptors as before."""
    system, node = place
    before = descriptors(node)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: CLIENT.get(each[0], headers=each[1]), questions(system, 50)))
    assert {answer.status_code for answer in answers} == {200}
    assert descriptors(node) == before


@pytest.mark.parametrize("kind", [Customer, CustomerV2])
def test_fault_33_an_open_channel_is_followed(place: Market, kind: type[Customer]) -> None:
    """The opening adds one descriptor, and the channel's settlement is noticed deep in the chain."""
    system, node = place
    before = descriptors(node)
    customer = kind(system, node)
    customer.fund()
    assert code(customer.open()) == (400, "funding_unconfirmed")
    node.mine()
    assert descriptors(node) == before
    assert customer.open().status_code == 201
    assert len(descriptors(node) - before) == 1
    assert customer.close(OPENING_SAT).status_code in (200, 202)
    node.mine(2)
    customer.ends("closed")


@pytest.mark.parametrize("kind", [Customer, CustomerV2])
def test_fault_33_funding_that_came_before_a_restart_is_found(place: Market, kind: type[Customer]) -> None:
    """The server forgets the addresses that it gave out: one scan finds the output, however old it is."""
    system, node = place
    customer = kind(system, node)
    customer.fund()
    node.mine(25)
    system.restart_server()
    outputs = system.url + f"/v2/funding/{customer.terms.expiry.lock_time}/{customer.terms.client_key.hex()}/outputs"
    wait_for(lambda: len(CLIENT.get(outputs).json().get("outputs", [])) == 1, "found")
    assert customer.open().status_code == 201


def test_fault_65_scans_of_unpaid_addresses_delay_no_honest_payer(place: Market) -> None:
    """During simultaneous requests for two hundred unpaid addresses, honest outputs are listed, and channels open."""
    system, node = place
    honest = CustomerV2(system, node)
    honest.fund()
    node.mine()
    outputs = system.url + f"/v2/funding/{honest.terms.expiry.lock_time}/{honest.terms.client_key.hex()}/outputs"
    before = descriptors(node)
    with ThreadPoolExecutor(50) as pool:
        strangers = [pool.submit(CLIENT.get, url) for url, _ in questions(system, 200)[3::4]]
        mine = [CLIENT.get(outputs) for _ in range(10)]
        opened = honest.open()
    assert {answer.status_code for answer in mine} == {200}
    assert {len(answer.json()["outputs"]) for answer in mine} == {1}
    assert opened.status_code == 201
    assert {each.result().status_code for each in strangers} == {200}
    assert len(descriptors(node) - before) == 1
