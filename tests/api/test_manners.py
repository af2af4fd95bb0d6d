"""Who sends bad signatures waits, and is turned away in the end; who pays is not concerned."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.lib.rbpcp import V1, V2, Payer, refusal
from tests.lib.system import System

LIMIT = 3


@pytest.fixture(scope="module", params=[True, False], ids=["lane", "handlers"])
def strict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server that takes few bad signatures from a connection."""
    http = f"max_bad_signatures = {LIMIT}\nfast_lane = {str(request.param).lower()}"
    with System(tmp_path_factory.mktemp("strict"), sections={"http": http}) as running:
        yield running


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A client of one connection, which nobody used before."""
    with httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_connections=1)) as client:
        yield client


def test_bad_signatures_end_their_connection(strict: System, http: httpx.Client) -> None:
    """After the last bad signature that is checked a payment gets 429, a code, and the end of its connection."""
    v1 = V1(strict.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201

    for _ in range(LIMIT):
        assert refusal(v1.pay(Payer().payment(100_001))) == (400, "bad_signature")
    ended = v1.pay(v1.payer.payment(100_001))

    assert refusal(ended) == (429, "too_many_bad_signatures")
    assert ended.headers["Connection"] == "close"


def test_another_connection_of_the_same_channel_is_not_concerned(strict: System, http: httpx.Client) -> None:
    """Bad signatures are a connection's, so nobody can lock a channel by sending some for it."""
    v1 = V1(strict.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201
    with httpx.Client(trust_env=False) as attacker:
        bad = V1(strict.url, v1.payer, attacker)
        assert [bad.pay(Payer().payment(100_001)).status_code for _ in range(LIMIT + 1)] == [400] * LIMIT + [429]

    assert [v1.pay(v1.payer.payment(100_001 + paid)).status_code for paid in range(50)] == [200] * 50


def test_both_versions_and_closings_are_counted_together(strict: System, http: httpx.Client) -> None:
    """Openings, payments and closings with bad signatures are one count, whichever way they take."""
    v1, v2 = V1(strict.url, Payer(), http), V2(strict.url, Payer(), http)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201

    answers = [
        v1.open(Payer().payment(100_000)),
        v2.pay(Payer().payment(100_001)),
        v2.close(Payer().payment(100_001)),
        v2.pay(v2.payer.payment(100_001)),
    ]

    assert [answer.status_code for answer in answers] == [400, 400, 400, 429]


def test_other_refusals_cost_nothing(strict: System, http: httpx.Client) -> None:
    """Only what had to be checked is counted: mistakes that are cheap to see may go on for ever."""
    v1 = V1(strict.url, Payer(), http)
    assert v1.open(v1.payer.payment(100_000)).status_code == 201

    for _ in range(5 * LIMIT):
        assert refusal(v1.pay(v1.payer.payment(99_999))) == (400, "value_backwards")
    assert v1.pay(v1.payer.payment(100_001)).status_code == 200
