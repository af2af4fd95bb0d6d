"""A server under an attacker's control: it gets no wrong signature from the signer, by any requests in any order.

`takeover` makes the requests, `judge` judges the replies.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from paychan.protocol.types import Sat
from paychan.protocol.wire.signer_messages import (
    AgainRequest,
    ChildReply,
    ChildRequest,
    Refusal,
    Request,
    SettlementReply,
    SettlementRequest,
)
from signer.keys.ring import KeyRing
from tests.signer.doors import Door, Inside, Outside
from tests.signer.hostile import Plan
from tests.signer.judge import Rules
from tests.signer.takeover import HostileServer
from tests.signer.tricks import TRICKS

SETTINGS = settings(
    max_examples=2,  # the simplest one, which does almost nothing, and one more: most others would be variations
    stateful_step_count=40,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

RULES = [
    Rules(),
    Rules(fee_percent=10, fee_sat=20_000),
    Rules(hour_sat=1_500_000, day_sat=4_000_000),
    Rules(heartbeat_seconds=7_200, unattended_sat=500_000),
]
"""Limits of operators."""

RUNS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory if possible: syncs of a disk are slow, and no file is needed later."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir=memory))
    yield path
    shutil.rmtree(path)


def server_at(open_door: Callable[[KeyRing, bytes | None], Door], rules: Rules) -> type[HostileServer]:
    """A hostile server that counts its replies."""

    class Here(HostileServer):
        answers: ClassVar = Counter[tuple[str, str]]()

    Here.open_door, Here.limits = staticmethod(open_door), rules
    return Here


def inside(folder: Path, rules: Rules) -> type[HostileServer]:
    """A hostile server for a handler over its own ledger."""
    return server_at(lambda keys, _: Inside(Path(tempfile.mkdtemp(dir=folder)), keys, rules), rules)


def given_share(answers: Counter[tuple[str, str]], *kinds: type[Request]) -> float:
    """Share of the requests of these kinds that were granted."""
    names = {kind.__name__ for kind in kinds}
    counts = Counter[bool]()
    for (asked, answer), count in answers.items():
        counts[answer == "given"] += count * (asked in names)
    return counts[True] / counts.total()


def try_anything(server: type[HostileServer], runs: Iterable[int]) -> None:
    """Run it, with the same seeds every time, so that a failure can be reproduced."""
    for number in runs:
        run_state_machine_as_test(seed(number)(server), settings=SETTINGS)


@pytest.mark.timeout(600)  # shrinking a failure takes minutes
@pytest.mark.parametrize("number", range(len(RULES)))
def test_threat_31_server_that_was_taken_over_gets_nothing(number: int, folder: Path) -> None:
    """Only the destinations of the newest payment and the operator are paid, and never too much, for any order of requests.

    A third of the requests for signatures is valid, so that the ledger has entries for its rules.
    """
    server = inside(folder, RULES[number])
    good = 1 / 4 if RULES[number].hour_sat else 1 / 3  # with limits on sums, many valid requests come too early

    try_anything(server, range(number * RUNS, (number + 1) * RUNS))

    assert given_share(server.answers, SettlementRequest) > good
    assert given_share(server.answers, SettlementRequest, ChildRequest, AgainRequest) > good


@pytest.mark.timeout(600)
def test_threat_31_server_that_was_taken_over_gets_nothing_from_the_process(folder: Path) -> None:
    """The same over the socket of a real signer, which is killed meanwhile."""
    rules = Rules(fee_percent=40, hour_sat=20_000_000)
    server = server_at(lambda _, address: Outside(Path(tempfile.mkdtemp(dir=folder)), address, rules), rules)

    try_anything(server, range(3))

    assert server.answers["SettlementRequest", "given"] > 20


@pytest.mark.parametrize("trick", sorted(TRICKS))
def test_threat_31_one_thing_wrong(trick: str, folder: Path) -> None:
    """No trick, tried on many valid requests, makes the signer sign anything wrong."""
    server = inside(folder, Rules())()
    server.begin(None, set(), [])
    plans = [
        Plan([number, number // 2], "newer", "right", "dearer", [number] if number % 3 else None, number)
        for number in range(16)
    ]

    try:
        server.settle_with_a_trick([(plan, trick) for plan in plans])
        server.settle(plans)
        server.settle_with_a_trick([(plan, trick) for plan in plans])
    finally:
        server.teardown()

    assert server.answers["SettlementRequest", "given"] >= 8


@pytest.mark.parametrize("funding_sat", [700, 2_500])
def test_children_leave_the_reserve_alone(funding_sat: int, folder: Path) -> None:
    """A channel that earned less than the least fee cap has no child that burns coins of the reserve."""
    server = inside(folder, Rules())()
    server.begin(None, set(), [])
    place = next(n for n, place in enumerate(server.attacker.places) if place.value_sat == funding_sat)
    parent = server.attacker.request(Plan([place], "newer", "right", "dearer", [0], 0))
    left_sat = sum(claim.received_sat for claim in parent.claims) - parent.fee_sat

    [signed] = server.ask(parent)
    [refused] = server.ask(ChildRequest(1, parent, Sat(left_sat + 1)))
    [child] = server.ask(ChildRequest(1, parent, Sat(left_sat)))
    server.teardown()

    assert isinstance(signed, SettlementReply)
    assert isinstance(refused, Refusal)
    assert (refused.tag, isinstance(child, ChildReply)) == ("policy-fee", True)


def test_an_hour_is_never_less(folder: Path) -> None:
    """A signature counts for a whole hour from any time in its span of ten minutes; then new sums are signed again."""
    server = inside(folder, Rules(hour_sat=900_000))()
    server.begin(None, set(), [])
    first, second = (server.attacker.request(Plan([n], "newer", "right", "dearer", None, 0)) for n in range(2))

    [signed] = server.ask(first)
    server.wait(3_500, beat=False)
    [refused] = server.ask(second)
    server.wait(701, beat=False)
    [later] = server.ask(second)
    server.teardown()

    assert isinstance(signed, SettlementReply)
    assert isinstance(refused, Refusal)
    assert (refused.tag, isinstance(later, SettlementReply)) == ("policy-rate", True)
