"""What one client address may ask of signer and node, and that payments are not counted (faults 33 and 65)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from paychan.api.budgets.penalty import Penalty
from paychan.api.budgets.request_rates import BURST_SECONDS
from paychan.protocol.errors import TooManyRequests
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server behind a proxy, where each client may ask once a second."""
    http = "asks_per_second = 1\ntrust_forwarded = true"
    with System(tmp_path_factory.mktemp("narrow"), sections={"http": http}) as system:
        yield system


def doors(payer: Payer) -> list[tuple[str, str]]:
    key, expiry = payer.public_key.hex(), payer.expiry
    return [
        ("GET", f"/v1/fundingInfo?client_pubkey={key}&exp_time={expiry}"),
        ("GET", f"/v2/funding/{expiry}/{key}/info"),
        ("GET", f"/v2/funding/{expiry}/{key}/outputs"),
        ("POST", "/v1/channels/new"),
        ("POST", f"/v2/channels/{'11' * 32}/0?secret={'22' * 32}"),
    ]


def test_fault_33_all_doors_of_strangers_share_one_budget_for_each_address(narrow: System, http: httpx.Client) -> None:
    """Ten questions at once, then 429 with the time to wait at every door; another address, and payments, go on."""
    payer, here = Payer(), {"X-Forwarded-For": "192.0.2.7"}
    opened = V1(narrow.url, payer, http)
    assert opened.open(payer.payment(100_000)).status_code == 201

    answers = [http.request(*doors(payer)[0][:1], narrow.url + doors(payer)[0][1], headers=here) for _ in range(10)]
    assert {answer.status_code for answer in answers} == {200}
    assert len(answers) == BURST_SECONDS
    for method, path in doors(payer):
        refused = http.request(method, narrow.url + path, headers=here)
        while refused.status_code != 429:  # a slow machine has earned another question meanwhile
            refused = http.request(method, narrow.url + path, headers=here)
        assert refused.json()["code"] == "too_many_requests"
        assert 1 <= int(refused.headers["Retry-After"]) <= 2
    elsewhere = http.get(narrow.url + doors(payer)[0][1], headers={"X-Forwarded-For": "192.0.2.8"})
    assert elsewhere.status_code == 200
    paid = [opened.pay(payer.payment(100_000 + n)).status_code for n in range(1, 31)]
    assert set(paid) == {200}


def test_fault_33_a_refusal_for_haste_comes_late_and_is_not_held_against_the_connection() -> None:
    """An attacker that waits for each answer gets two a second on a connection; an honest client keeps its connection."""
    penalty = Penalty(3)
    assert [penalty.refused(TooManyRequests(limit=1, wait_seconds=1)) for _ in range(10)] == [0.5] * 10
    assert penalty.problem() is None


def test_fault_33_an_address_that_lies_about_itself_is_believed_only_behind_a_proxy(
    tmp_path: Path, http: httpx.Client
) -> None:
    """Without `http.trust_forwarded` the header changes nothing: all requests are of one address."""
    payer = Payer()
    with System(tmp_path, sections={"http": "asks_per_second = 1"}) as system:
        url = system.url + doors(payer)[0][1]
        answers = [http.get(url, headers={"X-Forwarded-For": f"192.0.2.{n}"}).status_code for n in range(12)]
        while answers[-1] != 429:
            answers.append(http.get(url, headers={"X-Forwarded-For": f"198.51.100.{len(answers)}"}).status_code)
    assert set(answers) == {200, 429}
