"""Damage inside a real server's store (fault 32): an alarm names it, and every readable channel is settled when due."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from paychan.protocol.types import OutPoint, UnixTime
from paychan.running import read_running
from paychan.store.backup.archive import decoded, read_records
from paychan.store.backup.salvage import salvage
from tests.functional.test_unsigned import System, wait_for
from tests.lib.rbpcp import V1, Payer

CHANNELS = 40
PAID_SAT = 100_000
DUE = "[channel]\nsettlement_period_hours = 87840\n[open]\nmin_duration_hours = 87840\nmax_duration_hours = 0\n"
"""With this every open channel is due."""


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    system = System(tmp_path / "system", sections={"watcher": "interval_seconds = 0.2"})
    system.start_signer()
    yield system
    system.__exit__(None, None, None)


def opened(system: System, http: httpx.Client, number: int) -> list[OutPoint]:
    clients = [V1(system.url, Payer(), http) for _ in range(number)]
    for client in clients:
        answer = client.open(client.payer.payment(PAID_SAT))
        assert answer.status_code == 201, answer.text
    return [client.payer.outpoint for client in clients]


def succeeded(system: System, task: str) -> bool:
    tasks = system.manage("GET", "/health").json()["tasks"]
    return any(each["name"] == task and each["last_success"] for each in tasks)


def flip(store: Path, percent: int) -> None:
    """Change four bytes of the largest table."""
    table = max(store.glob("*.ldb"), key=lambda file: file.stat().st_size)
    content = bytearray(table.read_bytes())
    place = len(content) * percent // 100
    content[place : place + 4] = bytes(byte ^ 0xFF for byte in content[place : place + 4])
    table.write_bytes(content)


def readable(store: Path, work: Path) -> set[str]:
    """Outpoints of all records that a salvage finds."""
    copy = shutil.copytree(store, work / "copy")
    found = salvage(copy, work / "backups", "debug", UnixTime(1), lambda _: None)
    return {str(decoded(found.path, raw).outpoint) for raw in read_records(found.path)}


def closed(system: System) -> set[str]:
    listed = system.manage("GET", "/channels?state=closed&limit=1000").json()["channels"]
    return {channel["funding_source"] for channel in listed}


def store_alarms(system: System) -> list[dict[str, str]]:
    answer = system.manage("GET", "/health")
    alarms = [alarm for alarm in answer.json()["alarms"] if alarm["kind"] == "store"]
    assert answer.status_code == (503 if alarms else 200)
    return alarms


def all_are_due(system: System) -> None:
    system.server_file.write_text(system.server_file.read_text() + DUE)


def damaged(system: System, tmp_path: Path, percent: int) -> tuple[set[str], set[str]]:
    """Damage the store of a stopped server with open channels that are all due; return the readable and the lost ones."""
    store = system.state / "store"
    with httpx.Client(timeout=30, trust_env=False, verify=False) as http:
        system.start_server()
        outpoints = {str(outpoint) for outpoint in opened(system, http, CHANNELS)}
        system.restart_server()  # the log becomes a table
        wait_for(lambda: succeeded(system, "payments shown"), "shown")
        assert store_alarms(system) == []
        system.kill_server()
    flip(store, percent)
    good = readable(store, tmp_path)
    assert good
    all_are_due(system)
    return good, outpoints - good


def log_of(system: System) -> str:
    assert system.server is not None
    return system.server.text()


def aside_of(system: System) -> list[Path]:
    return sorted(system.state.glob("store.damaged-*"))


def serves_after_rebuild(system: System) -> bool:
    return bool(aside_of(system)) and serves(system)


def serves(system: System) -> bool:
    """The server starts again by itself when it meets the damage, and listens on other ports then."""
    running = read_running(system.state)
    if running is None:
        return False
    system.running = running
    try:
        return system.manage("GET", "/health").status_code in (200, 503)
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("percent", [10, 50, 90])
def test_fault_32_a_damaged_block_stops_no_other_channel(system: System, tmp_path: Path, percent: int) -> None:
    """Wherever a table is damaged: the server rebuilds its store by itself, says so, and settles all readable channels."""
    good, lost = damaged(system, tmp_path, percent)

    system.start_server()
    wait_for(lambda: serves_after_rebuild(system), "rebuilt")
    wait_for(lambda: closed(system) == good, "settled")
    assert sum(system.manage("GET", "/totals").json()["channels"].values()) == len(good)
    (aside,) = aside_of(system)
    assert (aside / "CURRENT").exists()
    assert any(str(aside) in alarm["text"] for alarm in store_alarms(system))
    wait_for(lambda: system.manage("POST", "/backups").status_code == 201, "backup in the next second")

    system.restart_server()
    assert closed(system) == good
    assert store_alarms(system)
    aside.rename(tmp_path / "kept")
    assert not any(str(aside) in alarm["text"] for alarm in store_alarms(system)), "moving it away ends the alarm"
    missing = system.state / "store.missing"
    if lost:
        wait_for(missing.exists, "the signer knows the lost channels")
        assert set(missing.read_text().split()) == lost
        missing.rename(system.state / "store.missing.accepted")
    assert store_alarms(system) == []


@pytest.mark.parametrize("percent", [10, 70, 88])
def test_fault_32_without_a_rebuild_the_readable_channels_settle(system: System, tmp_path: Path, percent: int) -> None:
    """If a rebuild is impossible, the rest is settled and counted, and each refusal names the damage and the remedy."""
    good, lost = damaged(system, tmp_path, percent)
    obstacle = system.state / ".store.rebuilt"
    obstacle.touch()  # no fresh store can be made here

    system.start_server()
    wait_for(lambda: "can't be rebuilt" in log_of(system), "an attempt")
    wait_for(lambda: serves(system), "serving")
    assert "paychan backup salvage" in store_alarms(system)[0]["text"]
    wait_for(lambda: sum(counts(system).values()) == counts(system)["closed"], "settled")
    settled = closed(system)
    assert settled <= good
    refused = (good | lost) - settled
    for outpoint in refused:
        txid, vout = outpoint.split(":")
        for method, path in (("GET", ""), ("POST", "/close")):
            answer = system.manage(method, f"/channels/{txid}/{vout}{path}")
            assert (answer.status_code, answer.json()["code"]) == (503, "damaged_record")
            assert "Corruption" in answer.json()["error"]
        public = httpx.delete(f"{system.url}/{txid}/{vout}", params={"payment": "AA"}, trust_env=False, verify=False)
        assert "Corruption" not in public.text
    wait_for(lambda: "paychan backup salvage" in why_no_backup(system), "reason in the next second")

    obstacle.unlink()
    system.restart_server()
    wait_for(lambda: serves_after_rebuild(system), "rebuilt")
    wait_for(lambda: closed(system) == good, "settled")


def why_no_backup(system: System) -> str:
    answer = system.manage("POST", "/backups")
    assert (answer.status_code, answer.json()["code"]) == (500, "backup_failed")
    return str(answer.json()["error"])


def counts(system: System) -> dict[str, int]:
    channels: dict[str, int] = system.manage("GET", "/totals").json()["channels"]
    return channels


def test_fault_32_a_store_that_can_not_be_written_is_rebuilt(system: System, tmp_path: Path) -> None:
    """LevelDB stops at a damaged table that it compacts: the server ends once, and the next start settles the rest."""
    store = system.state / "store"
    with httpx.Client(timeout=30, trust_env=False, verify=False) as http:
        system.start_server()
        for _ in range(4):  # four tables of the first level: at the next start LevelDB compacts them
            opened(system, http, 10)
            system.restart_server()
        system.kill_server()
    flip(store, 10)
    good = readable(store, tmp_path)
    all_are_due(system)

    starts = 0
    while not aside_of(system):
        starts += 1
        assert starts <= 2, "it rebuilds at the start after the failed write"
        assert starts_and_ends(system) in (None, 3)
    wait_for(lambda: serves_after_rebuild(system), "serving")
    wait_for(lambda: closed(system) == good, "settled")
    assert store_alarms(system)


def starts_and_ends(system: System) -> int | None:
    """Start the server; return its exit status if it ends within some seconds."""
    with contextlib.suppress(AssertionError):
        system.start_server()
    assert system.server is not None
    ends = time.monotonic() + 20
    while time.monotonic() < ends and not aside_of(system):
        if system.server.process.poll() is not None:
            return system.server.process.returncode
        time.sleep(0.05)
    return system.server.process.poll()


@pytest.mark.parametrize("reserve_mb", [0, 8])
def test_no_payment_is_acknowledged_into_a_removed_store(tmp_path: Path, reserve_mb: int) -> None:
    """LevelDB writes on into files without a name; the server ends at the first write that no start would find."""
    with System(tmp_path, sections={"store": f"reserve_mb = {reserve_mb}"}) as system, httpx.Client() as http:
        client = V1(system.url, Payer(), http)
        assert client.open(client.payer.payment(PAID_SAT)).status_code == 201
        shutil.rmtree(system.state / "store")
        with pytest.raises(httpx.TransportError):
            client.pay(client.payer.payment(PAID_SAT + 1))
        assert system.server is not None
        assert system.server.process.wait(30) != 0
