"""The shipped systemd files: units are valid, their exposure is low, and both programs work under their restrictions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paychan.running import read_running
from tests.lib.sandbox import allowed_calls, read_unit
from tests.lib.system import SERVER, SIGNER

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "config" / "README.md"
DEPLOY = ROOT / "config" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
DAEMONS = [unit for unit in UNITS if "Type=oneshot" not in unit.read_text()]
PROGRAMS = Path(sys.executable).parent

MOST_EXPOSURE = {"paychan-signer.service": 1.0, "paychan.service": 2.0, "paychan-backup.service": 2.0}
"""Of ten. systemd rates less than 2 as "OK" or "SAFE"; an empty unit gets 9.6."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the package systemd")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *words], capture_output=True, text=True, check=False, timeout=60
    )


def exposure(unit: Path) -> float:
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", analyze("security", "--offline=true", unit).stdout)
    assert found
    return float(found[1])


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_exposure_is_low_and_quoted(unit: Path) -> None:
    """`systemd-analyze security` stays below the bound; the unit's head and config/README.md quote its figure."""
    found = exposure(unit)

    assert found <= MOST_EXPOSURE[unit.name]
    assert f"# → Overall exposure level for {unit.name}: {found} " in unit.read_text()
    assert f"`{unit.name}`: {found}" in PAGE.read_text()


@needs_systemd
def test_units_are_right(tmp_path: Path) -> None:
    """`systemd-analyze verify` reports nothing, once the programs that the units name exist."""
    for unit in (*UNITS, DEPLOY / "paychan-backup.timer"):
        text = unit.read_text().replace("/opt/paychan/bin/", f"{PROGRAMS}/")
        assert text != unit.read_text() or unit.suffix == ".timer"
        (tmp_path / unit.name).write_text(text)

    checked = analyze("verify", *tmp_path.iterdir())

    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.parametrize("unit", DAEMONS, ids=lambda unit: unit.name)
def test_fault_26_units_restart_without_limit(unit: Path) -> None:
    """Systemd restarts a service after any kind of failure, without a limit, and not before the clock is synchronised."""
    settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line and line[0] != "#")

    assert settings["StartLimitIntervalSec"] == "0"
    assert settings["Restart"] == "always"
    assert "time-sync.target" in settings["After"]
    assert "time-sync.target" in settings["Wants"]


@needs_systemd
def test_users_and_directories_are_right() -> None:
    """The files for sysusers and tmpfiles parse, and create every user, group and directory that the units name."""
    made = subprocess.run(
        ["systemd-sysusers", "--dry-run", DEPLOY / "paychan.sysusers"], capture_output=True, text=True, check=True
    )
    users = (DEPLOY / "paychan.sysusers").read_text()
    directories = (DEPLOY / "paychan.tmpfiles").read_text()
    for unit in UNITS:
        service = read_unit(unit)
        for name in (*service["User"], *service["Group"], *service.get("SupplementaryGroups", [])):
            assert re.search(rf"^[ug] {re.escape(name)} ", users, re.MULTILINE), name
        (state,), (mode,), (user,) = service["StateDirectory"], service["StateDirectoryMode"], service["User"]
        assert re.search(rf"^d /var/lib/{state} +{mode} {user} ", directories, re.MULTILINE)

    assert "ailed" not in made.stderr


@needs_systemd
def test_the_filter_of_the_signer_allows_its_own_calls() -> None:
    """Of the privileged calls, the unit allows only those that the signer makes."""
    calls = allowed_calls(read_unit(DEPLOY / "paychan-signer.service")["SystemCallFilter"])

    assert {"seccomp", "mlockall", "setrlimit", "prlimit64", "chown", "execve", "clone3"} <= calls
    doors = {"ptrace", "mount", "bpf", "keyctl", "setuid", "capset", "io_uring_setup", "userfaultfd"}
    assert doors & calls == set()


class Sandboxed:
    """Signer and server in debug mode, each under the restrictions of its unit."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.log = directory / "log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.files = directory / "signer.toml", directory / "server.toml"
        for file, text in zip(self.files, (SIGNER, SERVER), strict=True):
            file.write_text(text.format(state=self.state))

    def start(self, unit: str, *words: str | Path) -> int:
        command = [sys.executable, "-m", "tests.lib.sandbox", DEPLOY / unit, PROGRAMS / words[0], *words[1:]]
        with self.log.open("ab") as log:
            self.processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
        return self.processes[-1].pid

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline, self.log.read_text()
            assert all(process.poll() is None for process in self.processes), self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> list[int]:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        return [process.wait(30) for process in self.processes]


@pytest.fixture
def sandboxed(tmp_path: Path) -> Iterator[Sandboxed]:
    running = Sandboxed(tmp_path)
    yield running
    for process in running.processes:
        process.kill()
        process.wait()


def pay(wallet: Path, *words: str | int) -> dict[str, object]:
    """Run a payer's command, outside of any sandbox, and return its JSON."""
    command = [PROGRAMS / "paychan", "channel", *map(str, words), "--json"]
    reported = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PAYCHAN_WALLET": str(wallet)},
    )
    answer: dict[str, object] = json.loads(reported.stdout)
    return answer


@needs_systemd
@needs_root
def test_a_whole_channel_under_the_units(sandboxed: Sandboxed, tmp_path: Path) -> None:
    """With the units' restrictions of system calls, sockets, network and memory, a channel is opened, paid and closed."""
    signer = sandboxed.start("paychan-signer.service", "paychan-signer", sandboxed.files[0])
    sandboxed.wait_for(sandboxed.state / "signer.sock")
    status = Path(f"/proc/{signer}/status").read_text()
    sandboxed.start("paychan.service", "paychan", "serve", sandboxed.files[1])
    sandboxed.wait_for(sandboxed.state / "running.json")
    running = read_running(sandboxed.state)
    assert running is not None

    name = str(pay(tmp_path / "wallet", "new", running.url, "--hours", 100, "--debug")["name"])
    pay(tmp_path / "wallet", "open", name)
    paid = pay(tmp_path / "wallet", "pay", name, 1000)
    closed = pay(tmp_path / "wallet", "close", name)
    sandboxed.start("paychan-backup.service", "paychan", "backup", "create", sandboxed.files[1])
    assert sandboxed.processes.pop().wait(30) == 0
    assert len(list((sandboxed.state / "backups").glob("*.backup"))) == 1

    assert closed["change_sat"] == paid["left_sat"]
    assert re.search(r"^Seccomp_filters:\s+2$", status, re.MULTILINE), sandboxed.log.read_text()
    assert sandboxed.stop() == [0, 0]
    assert "network out of reach (namespace, seccomp)" in sandboxed.log.read_text()
    assert "Traceback" not in sandboxed.log.read_text()
