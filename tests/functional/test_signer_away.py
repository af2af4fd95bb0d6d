"""A signer that hangs, dies or restarts, with a real node: payments continue, openings get 503, closings wait."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.lib.customer import LIFE_SECONDS, OPENING_SAT, Customer, CustomerV2, code, market, settled, wait_for
from tests.lib.node import Node
from tests.lib.system import System

DEADLINE_SECONDS = 4.0
SECTIONS = {"signer": f"deadline_seconds = {DEADLINE_SECONDS}"}
UNAVAILABLE = (503, "signer_unavailable")

POINT = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"
_SECONDS = itertools.count()

HOW = pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["hung", "killed"])


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Node]]:
    with market(tmp_path_factory.mktemp("deployment"), SECTIONS) as deployment:
        yield deployment


@pytest.fixture
def system(deployment: tuple[System, Node]) -> Iterator[System]:
    """Run the signer before and after each test."""
    system = deployment[0]
    yield system
    bring_back(system)


def customers(deployment: tuple[System, Node], number: int = 1) -> list[Customer]:
    """Return customers of both versions with open channels."""
    made = [kind(*deployment) for kind in (Customer, CustomerV2) for _ in range(number)]
    for customer in made:
        customer.fund()
    deployment[1].mine()
    for customer in made:
        wait_for(lambda customer=customer: customer.open().status_code == 201, "opened")
    return made


def take_away(system: System, how: signal.Signals) -> None:
    assert system.signer is not None
    if how is signal.SIGSTOP:
        system.signer.process.send_signal(how)
    else:
        system.signer.stop(how)


def bring_back(system: System) -> None:
    """Resume it, or start it again, and wait until the server reports it."""
    assert system.signer is not None
    if system.signer.process.poll() is None:
        system.signer.process.send_signal(signal.SIGCONT)
    else:
        system.start_signer()
    wait_for(lambda: health(system) == "hardened", "signer is back")
    url = f"{system.url}/v1/fundingInfo"  # its answer on openings may be a second old
    wait_for(lambda: httpx.get(url, params=unknown(), timeout=30, verify=False).status_code == 200, "openings")


def health(system: System) -> str:
    return str(system.manage("GET", "/health").json()["signer"])


# --- payments ---------------------------------------------------------------------------------------------------------


@HOW
def test_payments_do_not_wait_for_the_signer(
    deployment: tuple[System, Node], system: System, how: signal.Signals
) -> None:
    """Two hundred payments, of v1 and v2, are booked while openings wait for a stopped signer; no payment waits for it."""
    payers = customers(deployment)
    stranger = Customer(*deployment)
    take_away(system, how)
    with ThreadPoolExecutor(8) as threads:
        opening = [threads.submit(stranger.ask, "GET", "/v1/fundingInfo", **unknown()) for _ in range(8)]
        begun = time.monotonic()
        for number in range(1, 101):
            for payer in payers:
                assert payer.pay(OPENING_SAT + number).status_code == 200
        took = time.monotonic() - begun

        assert {code(answer.result()) for answer in opening} == {UNAVAILABLE}
    assert took < 50 * DEADLINE_SECONDS  # 200 deadlines, if they waited for the signer
    assert all(payer.record["status"] == "open" for payer in payers)


def unknown() -> dict[str, str]:
    """Request terms for a new key: the server does not know the signer's key for them."""
    return {"client_pubkey": POINT, "exp_time": str(int(time.time()) + LIFE_SECONDS + next(_SECONDS))}


# --- openings ---------------------------------------------------------------------------------------------------------


@HOW
def test_openings_get_retry_after(deployment: tuple[System, Node], system: System, how: signal.Signals) -> None:
    """Terms and openings are 503 with code and Retry-After; nothing is stored; with the signer back, the same request opens."""
    waiting = [kind(*deployment) for kind in (Customer, CustomerV2)]
    for customer in waiting:
        customer.fund()
    deployment[1].mine()
    take_away(system, how)

    stranger = waiting[0].ask("GET", "/v1/fundingInfo", **unknown())
    answers = [stranger, *(customer.open() for customer in waiting)]

    for answer in answers:
        assert (code(answer), answer.headers["Retry-After"]) == (UNAVAILABLE, "5")
    assert health(system).startswith("absent: ")
    for customer in waiting:
        assert customer.record["code"] == "unknown_channel"
    bring_back(system)
    for customer in waiting:
        assert customer.open().status_code == 201


async def test_openings_do_not_pile_up(deployment: tuple[System, Node], system: System) -> None:
    """Of many openings while the signer hangs, the first wait for a deadline, all others are refused at once."""
    take_away(system, signal.SIGSTOP)
    limits = httpx.Limits(max_connections=40)
    async with httpx.AsyncClient(base_url=system.url, limits=limits, timeout=60, trust_env=False) as http:

        async def ask() -> tuple[int, str]:
            return code(await http.get("/v1/fundingInfo", params=unknown()))

        first = await asyncio.gather(*(ask() for _ in range(40)))
        begun = time.monotonic()
        for _ in range(100):
            assert await ask() == UNAVAILABLE
        took = time.monotonic() - begun

    assert set(first) == {UNAVAILABLE}
    assert took < 50 * DEADLINE_SECONDS  # a hundred deadlines, if each waited
    bring_back(system)
    assert Customer(*deployment).address


# --- closings ---------------------------------------------------------------------------------------------------------


@HOW
def test_closings_wait_and_are_settled_later(
    deployment: tuple[System, Node], system: System, how: signal.Signals
) -> None:
    """A closing while the signer is stopped gets 503, ends payments, and is settled after the signer's start, unasked."""
    leaving = customers(deployment, 3)
    take_away(system, how)
    for customer in leaving:
        assert code(customer.close(OPENING_SAT)) == UNAVAILABLE
        assert code(customer.pay(OPENING_SAT + 1)) == (410, "channel_closing")
    time.sleep(DEADLINE_SECONDS)  # the watcher tries, without success
    assert {customer.record["status"] for customer in leaving} == {"closing"}
    bring_back(system)

    for customer, outputs in zip(leaving, settled(*leaving), strict=True):
        assert outputs[customer.change_script.hex()] == 1_000_000 - OPENING_SAT


def test_signer_that_dies_again_and_again(deployment: tuple[System, Node], system: System) -> None:
    """However often the signer is killed while channels close, each channel is settled once, by its newest payment."""
    leaving = customers(deployment, 3)
    with ThreadPoolExecutor(len(leaving)) as threads:
        for _ in range(3):
            take_away(system, signal.SIGKILL)
            closing = [threads.submit(customer.close, OPENING_SAT) for customer in leaving]
            system.start_signer()
            time.sleep(0.3)
            for answer in closing:
                assert answer.result().status_code in (200, 202, 410, 503)
    bring_back(system)

    for customer, outputs in zip(leaving, settled(*leaving), strict=True):
        assert outputs[customer.change_script.hex()] == 1_000_000 - OPENING_SAT


def test_server_is_started_before_its_signer(tmp_path: Path, deployment: tuple[System, Node]) -> None:
    """A server that finds a hanging signer at its start continues by itself once the signer does."""
    with System(tmp_path, sections=SECTIONS, node=deployment[1]) as system, ThreadPoolExecutor(1) as threads:
        take_away(system, signal.SIGSTOP)
        system.kill_server()
        starting = threads.submit(system.start_server)
        time.sleep(1.0)
        assert not starting.done()
        bring = system.signer
        assert bring is not None
        bring.process.send_signal(signal.SIGCONT)
        starting.result()

        assert health(system) == "hardened"


def test_fault_63_health_alarms_about_a_problem_of_the_signer(tmp_path: Path) -> None:
    """A problem that the signer reports is an alarm of the server; settling continues, new channels get 503."""
    system = System(tmp_path)
    system.signer_file.write_text(system.signer_file.read_text() + "[disk]\nreserve_mb = 1048576\n")
    with system:
        alarms = system.manage("GET", "/health").json()["alarms"]
        answer = httpx.get(f"{system.url}/v1/fundingInfo", params=unknown(), timeout=30, verify=False)

        assert [alarm["kind"] for alarm in alarms] == ["signer"]
        assert "bytes are free at" in alarms[0]["text"]
        assert code(answer) == UNAVAILABLE
