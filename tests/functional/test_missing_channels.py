"""A store that lacks channels which the signer was shown (fault 32): an alarm says so, until the operator accepts it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.functional.test_damaged_store import opened, serves, store_alarms, succeeded
from tests.functional.test_unsigned import System, wait_for


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """A system whose signer was shown the payments of ten channels; the server is stopped."""
    system = System(tmp_path / "system", sections={"watcher": "interval_seconds = 0.2"})
    system.start_signer()
    with httpx.Client(timeout=30, trust_env=False, verify=False) as http:
        system.start_server()
        opened(system, http, 10)
        system.restart_server()  # the first round of showing comes at a start
        wait_for(lambda: succeeded(system, "payments shown"), "shown")
        assert store_alarms(system) == []
        system.kill_server()
    yield system
    system.__exit__(None, None, None)


def test_fault_32_an_empty_store_is_an_alarm(system: System, tmp_path: Path) -> None:
    """With nothing in the store's place, the missing channels are named; with the store back, nothing is missing."""
    store = system.state / "store"
    store.rename(tmp_path / "unmounted")

    system.start_server()
    wait_for(lambda: len(store_alarms(system)) == 1, "alarm")
    text = store_alarms(system)[0]["text"]
    assert "does not have: 10, the first is" in text
    listed = system.state / "store.missing"
    assert len(listed.read_text().split()) == 10

    listed.rename(system.state / "store.missing.accepted")
    assert store_alarms(system) == [], "accepted"
    (system.state / "store.missing.accepted").unlink()
    assert len(store_alarms(system)) == 1, "it lasts"

    system.kill_server()
    shutil.rmtree(store)
    (tmp_path / "unmounted").rename(store)
    system.start_server()
    wait_for(lambda: succeeded(system, "missing channels"), "compared")
    assert store_alarms(system) == []


def test_fault_32_a_deleted_log_is_an_alarm(system: System) -> None:
    """Without the newest log the store is rebuilt from the rest, or starts short; either way there is an alarm."""
    max((system.state / "store").glob("*.log")).unlink()

    system.start_server()
    wait_for(lambda: serves(system) and bool(store_alarms(system)), "alarm")
