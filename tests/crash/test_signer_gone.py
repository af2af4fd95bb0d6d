"""A signer that dies or hangs while the real server closes channels: the server waits for it, and then finishes."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from paychan.protocol.address import encode_address
from paychan.protocol.payment import encode_v1
from paychan.protocol.types import Network, UnixTime
from tests.lib.system import System
from tests.lib.world import DebugPayer

PATIENT = {"signer": "deadline_seconds = 2.0", "watcher": "interval_seconds = 0.1"}
OPENING_SAT = 100_000


@pytest.fixture
def system(tmp_path: Path):
    with System(tmp_path, sections=PATIENT) as system:
        yield system


def opened(system: System) -> tuple[DebugPayer, str]:
    """Open a channel; return its client and its path."""
    payer = DebugPayer(str(system.directory), UnixTime(int(time.time()) + 30 * 86_400))
    query = {
        "client_pubkey": payer.key.public_key.format().hex(),
        "exp_time": payer.expiry,
        "change_address": encode_address(payer.change_script, Network.TEST),
        "payment": payment(payer),
    }
    answer = httpx.post(f"{system.url}/v1/channels/new", params=query, verify=False)
    assert answer.status_code == 201, answer.text
    return payer, httpx.URL(answer.headers["Location"]).path


def payment(payer: DebugPayer, paid_sat: int = OPENING_SAT) -> str:
    return encode_v1(payer.pays(paid_sat).payment)


def close(system: System, payer: DebugPayer, path: str) -> httpx.Response:
    return httpx.delete(system.url + path, params={"payment": payment(payer)}, timeout=30, verify=False)


def closed(system: System, payer: DebugPayer) -> dict[str, Any]:
    """Wait until the channel is settled."""
    deadline = time.monotonic() + 30
    while (found := system.channel(payer.outpoint))["status"] != "closed":
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def remove_signer(system: System, how: signal.Signals) -> None:
    assert system.signer is not None
    if how is signal.SIGSTOP:
        system.signer.process.send_signal(how)
    else:
        system.signer.stop(how)


def return_signer(system: System, how: signal.Signals) -> None:
    assert system.signer is not None
    if how is signal.SIGSTOP:
        system.signer.process.send_signal(signal.SIGCONT)
    else:
        system.start_signer()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_threat_32_closing_waits_for_a_signer_that_is_gone(system: System, how: signal.Signals):
    """The client gets 503, the channel refuses payments, and it settles by itself when the signer is back."""
    payer, path = opened(system)
    remove_signer(system, how)
    answer = close(system, payer, path)

    assert (answer.status_code, answer.json()["code"]) == (503, "signer_unavailable")
    assert system.channel(payer.outpoint)["status"] == "closing"
    refused = httpx.put(system.url + path, params={"payment": payment(payer, OPENING_SAT + 10)}, verify=False)
    assert (refused.status_code, refused.json()["code"]) == (410, "channel_closing")

    return_signer(system, how)
    assert closed(system, payer)["value_left"] == payer.funding_sat - OPENING_SAT
    assert close(system, payer, path).status_code == 202


def test_threat_32_payments_continue_without_the_signer(system: System):
    """No payment needs the signer: while it hangs, open channels accept payments."""
    payer, path = opened(system)
    remove_signer(system, signal.SIGSTOP)
    answers = [
        httpx.put(system.url + path, params={"payment": payment(payer, OPENING_SAT + n)}, verify=False).status_code
        for n in range(1, 6)
    ]
    return_signer(system, signal.SIGSTOP)

    assert answers == [200] * 5


def test_a_running_request_is_answered_before_the_server_ends(tmp_path: Path):
    """SIGTERM while a client waits for its settlement: the client gets its answer, and the exit status is 0."""
    with System(tmp_path, sections={"signer": "deadline_seconds = 2.0"}) as system, ThreadPoolExecutor(1) as threads:
        assert system.server is not None
        payer, path = opened(system)
        remove_signer(system, signal.SIGSTOP)
        answer = threads.submit(close, system, payer, path)
        while system.channel(payer.outpoint)["status"] != "closing":
            time.sleep(0.01)
        status = system.server.stop()
        return_signer(system, signal.SIGSTOP)

        assert (answer.result().status_code, status) == (503, 0)
        system.start_server()
        assert closed(system, payer)["settlement_txid"]


def test_a_closing_survives_the_death_of_server_and_signer(system: System):
    """Both are killed after the client's request; when both are back, the channel settles without another request."""
    payer, path = opened(system)
    remove_signer(system, signal.SIGKILL)
    assert close(system, payer, path).status_code == 503
    system.kill_server()
    system.start_signer()
    system.start_server()

    assert closed(system, payer)["settlement_txid"]
