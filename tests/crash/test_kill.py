"""`kill -9` of the real server under real load (threat 11): every answered request survives, at any moment."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.crash.customers import Crowd
from tests.lib.campaign import sized
from tests.lib.system import Daemon, System

KILLS = sized(20, campaign=50)
CUSTOMERS = 4


@pytest.mark.timeout(900)
def test_threat_11_kills_lose_no_answered_payment(tmp_path: Path):
    """After each kill while customers open, pay and close, every record agrees with its customer's answers.

    That is: the change is that of an answered payment or of the one in flight, no channel is lost or duplicated, and
    every closing that began is finished.
    """
    moments = random.Random(11)
    with System(tmp_path) as system:
        crowd = Crowd(system)
        crowd.start(CUSTOMERS)
        for number in range(KILLS):
            crowd.wait_for_answers(moments.randrange(30))
            time.sleep(moments.uniform(0, 0.01))
            system.kill_server()
            crowd.pause()
            if number % 5 == 0:
                kill_while_starting(system, moments.uniform(0.1, 0.4))
            system.start_server()
            crowd.check()
            crowd.resume()
        crowd.stop()
        crowd.check(all_histories=True)
        crowd.check_totals()

        assert crowd.answers > 10 * KILLS


def kill_while_starting(system: System, seconds: float) -> None:
    """Start the server, and kill it so early that it has just begun to listen, or not yet."""
    starting = Daemon(system.directory / "server.log", "paychan", "serve", str(system.server_file))
    time.sleep(seconds)
    starting.stop(signal.SIGKILL)


def test_sigterm_under_load_ends_with_status_0(tmp_path: Path):
    """SIGTERM while customers pay: the server stops cleanly, and every answered payment is found afterwards."""
    with System(tmp_path) as system:
        crowd = Crowd(system)
        crowd.start(CUSTOMERS)
        for _ in range(3):
            time.sleep(0.3)
            assert system.server is not None
            assert system.server.stop() == 0, system.server.text()
            crowd.pause()
            system.start_server()
            crowd.check()
            crowd.resume()
        crowd.stop()
        crowd.check(all_histories=True)
        crowd.check_totals()
