"""`paychan status` for monitors: its exit status, its JSON, and the amounts in the log's events."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.alarm import Kind
from paychan.shared.wording import clock
from tests.lib.looped import looped
from tests.lib.rbpcp import V1, Payer
from tests.lib.system import System

PAYCHAN = str(Path(sys.executable).with_name("paychan"))
AN_HOUR = ("--backup-hours", "1")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("watched")) as running:
        yield running


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PAYCHAN, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


def status(system: System, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of `paychan status`."""
    ended = run("status", system.server_file, "--json", *options)
    return ended.returncode, json.loads(ended.stdout)


def events(system: System, name: str) -> list[dict[str, str]]:
    """The log's lines of an event, by field."""
    found = []
    for line in system.server.text().splitlines():
        fields = {key: text.strip('"') for key, text in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', line)}
        if fields.get("event") == name:
            found.append(fields)
    return found


def test_fault_54_status_says_what_a_monitor_asks(system: System) -> None:
    """Without an alarm the exit status is 0, and the JSON has disk, backup, tasks and alarms."""
    code, shown = status(system)

    assert (code, shown["status"], shown["health"]["alarms"], shown["health"]["frozen"]) == (0, "ok", [], [])
    assert shown["health"]["disk"]["free_bytes"] > shown["health"]["disk"]["reserve_bytes"] > 0
    assert shown["health"]["signer"] == "debug"
    assert {task["problem"] for task in shown["health"]["tasks"]} == {""}
    assert set(shown["totals"]["channels"]) >= {"open", "closing", "published"}


def test_fault_54_a_missing_or_old_backup_is_a_warning(system: System) -> None:
    """The age of the newest backup is known from the backup directory; a limit makes it an alarm."""
    code, shown = status(system, *AN_HOUR)
    assert (code, shown["status"], shown["health"]["backup"]["age_seconds"]) == (1, "warning", None)
    assert [alarm["kind"] for alarm in shown["health"]["alarms"]] == ["backup"]

    assert run("backup", "create", system.server_file).returncode == 0
    code, shown = status(system, *AN_HOUR)
    assert (code, shown["status"]) == (0, "ok")
    assert 0 <= shown["health"]["backup"]["age_seconds"] < 60


def test_fault_54_a_signer_that_is_away_is_critical(system: System) -> None:
    """A monitor sees by the exit status, and for people in words, that a part is away."""
    assert system.signer is not None
    system.signer.stop()
    try:
        code, shown = status(system)
        words = run("status", system.server_file)
    finally:
        system.start_signer()

    assert (code, shown["status"]) == (2, "critical")
    assert {(alarm["kind"], alarm["critical"]) for alarm in shown["health"]["alarms"]} == {("signer", True)}
    assert words.returncode == 2
    assert "critical" in words.stdout


def test_fault_54_a_monitor_without_the_token_gets_the_word(system: System) -> None:
    """`/health` says in one word how the server is, without reasons."""
    health = httpx.get(f"{system.management_url}/health", trust_env=False).json()

    assert health["status"] in ("ok", "warning", "critical")
    assert "disk" not in health
    assert "backup" not in health


@pytest.mark.parametrize("text", ["", "network = 1"], ids=["no server", "wrong settings"])
def test_fault_54_an_unknown_state_has_its_own_exit_status(tmp_path: Path, text: str) -> None:
    """Exit status 3: no server, wrong settings or no file. The reason is JSON, too."""
    file = tmp_path / "server.toml"
    file.write_text(text or f'network = "test"\ndebug = true\nstate_dir = "{tmp_path}"\n[chain]\nbackend = "debug"\n')
    for named in (file, tmp_path / "nothing.toml"):
        ended = run("status", named, "--json")
        assert ended.returncode == 3
        assert set(json.loads(ended.stdout)) == {"code", "error"}


def test_fault_54_events_have_their_amounts(system: System) -> None:
    """The log says what was funded, received and paid as fee, and by which transaction."""
    payer = Payer(2_000_000_000)
    with httpx.Client(trust_env=False) as http:
        channel = V1(system.url, payer, http)
        assert channel.open(payer.payment(100_000)).status_code == 201
        assert channel.close(payer.payment(100_000)).status_code == 202
    name = str(payer.outpoint)
    (opened,) = [line for line in events(system, "channel opened") if line["channel"] == name]
    (settled,) = [line for line in events(system, "channel settled") if line["channel"] == name]

    assert (int(opened["received_sat"]), opened["expires"]) == (100_000, clock(2_000_000_000))
    assert int(opened["funding_sat"]) > 100_000
    assert (int(settled["received_sat"]), settled["reason"], settled["inputs"]) == (100_000, "client", "1")
    assert int(settled["fee_sat"]) > 0
    assert re.fullmatch("[0-9a-f]{64}", settled["txid"])


@looped("kind", Kind, ids=lambda kind: kind.value)
def test_the_page_has_each_kind_of_alarm_in_the_row_of_its_state(kind: Kind) -> None:
    """The table of config/README.md agrees with `critical` of the JSON; a chain that is away stops all payments."""
    page = (Path(__file__).parents[2] / "config" / "README.md").read_text()
    (row,) = re.findall(r"(?m)^\| \d \| `" + ("critical" if kind.is_critical else "warning") + r"` \| .*$", page)

    assert f"`{kind.value}`" in row
    assert Kind.CHAIN.is_critical


def test_the_pages_of_the_units_install_the_servers_packages() -> None:
    """A plain installation has only the payer's packages: `paychan serve` needs the extra."""
    for page in (Path(__file__).parents[2] / "config" / "deploy").iterdir():
        for command in re.findall(r"pip install [^)\n]*", page.read_text()):
            assert "[server]" in command or "--no-deps" in command, f"{page.name}: {command}"
