"""The rate limit of requests that cost signer or node work, per client address.

Payments do not count (faults 33, 65).
"""

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
    """A server behind a proxy, where each client may send one such request per second."""
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


def test_fault_33_all_open_routes_share_one_rate_for_each_address(narrow: System, http: httpx.Client) -> None:
    """After ten requests every route is 429 with the time to wait; other addresses, and payments, are served."""
    payer, here = Payer(), {"X-Forwarded-For": "192.0.2.7"}
    opened = V1(narrow.url, payer, http)
    assert opened.open(payer.payment(100_000)).status_code == 201

    answers = [http.request(*doors(payer)[0][:1], narrow.url + doors(payer)[0][1], headers=here) for _ in range(10)]
    assert {answer.status_code for answer in answers} == {200}
    assert len(answers) == BURST_SECONDS
    for method, path in doors(payer):
        refused = http.request(method, narrow.url + path, headers=here)
        while refused.status_code != 429:  # on a slow machine the rate has allowed another request
            refused = http.request(method, narrow.url + path, headers=here)
        assert refused.json()["code"] == "too_many_requests"
        assert 1 <= int(refused.headers["Retry-After"]) <= 2
    elsewhere = http.get(narrow.url + doors(payer)[0][1], headers={"X-Forwarded-For": "192.0.2.8"})
    assert elsewhere.status_code == 200
    paid = [opened.pay(payer.payment(100_000 + n)).status_code for n in range(1, 31)]
    assert set(paid) == {200}


def test_fault_33_a_rate_limited_request_is_delayed_and_is_not_a_bad_request() -> None:
    """An attacker that waits for each answer gets two per second; an honest client keeps its connection."""
    penalty = Penalty(3)
    assert [penalty.refused(TooManyRequests(limit=1, wait_seconds=1)) for _ in range(10)] == [0.5] * 10
    assert penalty.problem() is None


def test_fault_33_forwarded_addresses_count_only_behind_a_proxy(tmp_path: Path, http: httpx.Client) -> None:
    """Without `http.trust_forwarded` the header changes nothing: all requests count for one address."""
    payer = Payer()
    with System(tmp_path, sections={"http": "asks_per_second = 1"}) as system:
        url = system.url + doors(payer)[0][1]
        answers = [http.get(url, headers={"X-Forwarded-For": f"192.0.2.{n}"}).status_code for n in range(12)]
        while answers[-1] != 429:
            answers.append(http.get(url, headers={"X-Forwarded-For": f"198.51.100.{len(answers)}"}).status_code)
    assert set(answers) == {200, 429}
