"""RBPCP §5.3, §5.4, §6.4 and §7.1: channels near expiry, and channels that close while the signer is away."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from paychan.protocol.wire.rbpcp import Dialect
from tests.lib.customer import wait_for
from tests.lib.rbpcp import V1, V2, Payer, refusal
from tests.lib.system import System

DAYS_8 = 8 * 24


def _free(hours: int) -> dict[str, str]:
    """Settings: opening is free, and payments end `hours` before expiry."""
    price = "base_price_sat = 0\nadd_settlement_fee = false\nv2_price_sat = 0\n"
    return {
        "open": f"{price}min_duration_hours = {hours}",
        "channel": f"settlement_period_hours = {hours}",
        "settlement": "margin_hours = 0",
    }


def test_payments_end_before_expiry(tmp_path: Path, http: httpx.Client) -> None:
    """Defect D7: in the settlement period payments are 410, and channels worth settling are settled at start.

    The clock is not changed: the same store is opened again with a settlement period longer than the channels' life.
    """
    poor, rich, poor_v2 = Payer(), Payer(), Payer()
    with System(tmp_path, sections=_free(1)) as before:
        assert V1(before.url, poor, http).open(poor.payment(1)).status_code == 201
        assert V1(before.url, rich, http).open(rich.payment(100_000)).status_code == 201
        v2 = V2(before.url, poor_v2, http)
        assert v2.open(poor_v2.payment(1)).status_code == 201
    with System(tmp_path, sections=_free(DAYS_8)) as after:
        v2.url = after.url
        for refused in (
            V1(after.url, poor, http).pay(poor.payment(200_000)),
            V1(after.url, poor, http).pay(poor.payment(1)),
            v2.pay(poor_v2.payment(200_000)),
        ):
            assert refusal(refused) == (410, "channel_expiring")
            assert refused.json()["now_unix"] >= refused.json()["limit_unix"] > time.time() - 2 * 86_400
        assert after.channel(rich.outpoint)["close_reason"] == "expiry"
        assert refusal(V1(after.url, rich, http).pay(rich.payment(200_000))) == (410, "channel_closed")
        closed = V1(after.url, rich, http).close(rich.payment(100_000))
        assert (closed.status_code, closed.json()["settlement_txid"]) == (
            202,
            after.channel(rich.outpoint)["settlement_txid"],
        )
        late = Payer()
        assert refusal(V1(after.url, late, http).open(late.payment(100_000))) == (400, "expiry_too_soon")


def test_a_channel_not_worth_settling_stays_open(tmp_path: Path, http: httpx.Client) -> None:
    """A close for less than the cheapest relayed settlement is 400 with both numbers, and the channel stays open."""
    with System(tmp_path, sections=_free(1)) as running:
        v1, v2 = V1(running.url, Payer(), http), V2(running.url, Payer(), http)
        assert v1.open(v1.payer.payment(1)).status_code == 201
        assert v2.open(v2.payer.payment(1)).status_code == 201
        for refused in (v1.close(v1.payer.payment(1)), v2.close(v2.payer.payment(2))):
            assert refusal(refused) == (400, "not_economical")
            assert refused.json()["got_sat"] < refused.json()["need_sat"]
        assert v1.pay(v1.payer.payment(10_000)).status_code == 200
        assert v1.close(v1.payer.payment(10_000)).status_code == 202
        assert v2.close(v2.payer.payment(1_000)).status_code == 200


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server with a short deadline for its signer and a short watcher interval."""
    sections = {"signer": "deadline_seconds = 0.3", "watcher": "interval_seconds = 0.3"}
    with System(tmp_path_factory.mktemp("impatient"), sections=sections) as running:
        yield running


@pytest.fixture
def stopped_signer(impatient: System) -> Iterator[Callable[[], None]]:
    """Return a function that stops the signer; the fixture resumes it at the end."""
    assert impatient.signer is not None
    process = impatient.signer.process
    yield lambda: process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)


def _go_on(system: System) -> None:
    assert system.signer is not None
    system.signer.process.send_signal(signal.SIGCONT)


def _settled(system: System, payer: Payer) -> str:
    """Wait until the watcher has settled a channel; return the txid."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if system.channel(payer.outpoint)["status"] == "closed":
            return str(system.channel(payer.outpoint)["settlement_txid"])
        time.sleep(0.05)
    msg = f"not settled: {system.channel(payer.outpoint)}"
    raise AssertionError(msg)


def test_a_v1_channel_closes_when_the_signer_is_back(
    impatient: System, http: httpx.Client, stopped_signer: Callable[[], None]
) -> None:
    """Defect D4: a DELETE that can't be signed is 503, later payments fail, and the watcher settles the channel."""
    v1, newest = V1(impatient.url, payer := Payer(), http), payer.payment(100_000)
    assert v1.open(newest).status_code == 201
    stopped_signer()
    refused = v1.close(newest)
    assert (refusal(refused), refused.headers["Retry-After"]) == ((503, "signer_unavailable"), "5")
    assert refusal(v1.pay(payer.payment(200_000))) == (410, "channel_closing")
    assert refusal(v1.close(newest)) == (410, "channel_closing")
    again = v1.open(newest)
    assert (refusal(again), again.headers["Location"]) == ((409, "channel_exists"), v1.resource)
    _go_on(impatient)
    txid = _settled(impatient, payer)
    closed = v1.close(newest)
    assert (closed.status_code, closed.json()["settlement_txid"]) == (202, txid)


def test_a_v2_channel_closes_when_the_signer_is_back(
    impatient: System, http: httpx.Client, stopped_signer: Callable[[], None]
) -> None:
    """A close that can't be signed is 503, payments are then 410, and a later close is 200 with the txid."""
    v2 = V2(impatient.url, Payer(), http, Dialect.A)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    stopped_signer()
    assert refusal(v2.close(v2.payer.payment(120_000))) == (503, "signer_unavailable")
    assert refusal(v2.close(v2.payer.payment(120_000))) == (410, "channel_closing")
    assert refusal(v2.pay(v2.payer.payment(130_000))) == (410, "channel_closing")
    _go_on(impatient)
    txid = _settled(impatient, v2.payer)
    closed = v2.close(v2.payer.payment(120_000))
    assert (closed.status_code, closed.json()["settlement_txid"]) == (200, txid)


def test_threat_32_payments_go_on_without_the_signer(
    impatient: System, http: httpx.Client, stopped_signer: Callable[[], None]
) -> None:
    """Threat 32: open channels accept payments, also a draining one.

    Requests for new keys fail until the signer is back.
    """
    v1 = V1(impatient.url, payer := Payer(), http)
    assert v1.open(payer.payment(100_000)).status_code == 201
    stopped_signer()
    assert v1.pay(payer.payment(150_000)).json()["value_received"] == 50_000
    drained = v1.pay(payer.payment_of_change(0))
    assert (drained.status_code, drained.json()["channel_status"]) == (202, "closed")
    assert drained.json()["settlement_txid"] is None
    stranger = V1(impatient.url, Payer(), http)
    for refused in (stranger.funding_info(), stranger.open(stranger.payer.payment(100_000))):
        assert (refusal(refused), refused.headers["Retry-After"]) == ((503, "signer_unavailable"), "5")
    health = httpx.get(f"{impatient.management_url}/health", trust_env=False, verify=False).json()
    assert health["signer"].startswith("absent")
    _go_on(impatient)
    assert len(_settled(impatient, payer)) == 64


def test_an_opening_waits_for_the_signer(
    impatient: System, http: httpx.Client, stopped_signer: Callable[[], None]
) -> None:
    """Without the signer an opening is 503 and nothing is stored; the same request opens the channel later."""
    v1 = V1(impatient.url, payer := Payer(), http)
    wait_for(lambda: v1.funding_info().status_code == 200, "terms")  # an earlier test may have stopped the signer
    stopped_signer()
    refused = v1.open(payer.payment(100_000))
    assert (refusal(refused), refused.headers["Retry-After"]) == ((503, "signer_unavailable"), "5")
    assert impatient.channel(payer.outpoint)["code"] == "unknown_channel"
    _go_on(impatient)
    deadline = time.monotonic() + 20
    while (opened := v1.open(payer.payment(100_000))).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert opened.status_code == 201


def test_funding_must_be_deep_enough(tmp_path: Path, http: httpx.Client) -> None:
    """Too few confirmations are 400 with both numbers, in both versions."""
    with System(tmp_path, sections={"open": "min_confirmations = 1001"}) as running:
        v1, v2 = V1(running.url, Payer(), http), V2(running.url, Payer(), http)
        for refused in (v1.open(v1.payer.payment(100_000)), v2.open(v2.payer.payment(100_000))):
            assert refusal(refused) == (400, "funding_unconfirmed")
            assert (refused.json()["got"], refused.json()["need"]) == (1000, 1001)
