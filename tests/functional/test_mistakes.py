"""Mistakes of an operator at the start of server and signer: the reason is named at once, and is the true one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.smalldisk import small_file_system
from tests.lib.system import Daemon, System

PROGRAMS = Path(sys.executable).parent


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A debug system that is not started."""
    return System(tmp_path / "system")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[System]:
    """A system that has run once, on a disk that is now read-only."""
    with small_file_system(tmp_path / "disk", 400) as disk:
        made = System(disk)
        with made:
            pass
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield made


def said(*command: object, **environment: str) -> tuple[int, str]:
    """Exit status and output of a program that ends by itself."""
    program = [PROGRAMS / str(command[0]), *map(str, command[1:])]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, timeout=30, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout + done.stderr


def test_fault_55_a_server_says_at_once_that_it_waits_for_the_signer(system: System) -> None:
    """The first lines name the part and its path; later, seconds pass until the server listens."""
    server = Daemon(system.directory / "server.log", "paychan", "serve", str(system.server_file))
    try:
        deadline = time.monotonic() + 5
        while "waiting for a part" not in server.text():
            assert time.monotonic() < deadline, server.text()
            time.sleep(0.02)
        (line,) = (line for line in server.text().splitlines() if "waiting for a part" in line)
    finally:
        server.stop()

    assert "part=signer" in line
    assert str(system.state / "signer.sock") in line


def test_fault_55_a_read_only_disk_is_named(read_only: System) -> None:
    """Server, signer and backup name the read-only file system, and no other program that uses it."""
    for command in (
        ("paychan", "serve", read_only.server_file),
        ("paychan-signer", read_only.signer_file),
        ("paychan", "backup", "create", read_only.server_file),
        ("paychan-signer", "audit", "archive", read_only.signer_file),
    ):
        status, output = said(*command)
        assert status, output
        assert "read-only" in output.lower(), output
        assert "in use" not in output
        assert "Traceback" not in output


@pytest.mark.parametrize("command", [("serve", "server.toml"), ("up", ".")], ids=["serve", "up"])
def test_fault_55_a_wrong_port_of_the_environment_ends_the_start(system: System, command: tuple[str, str]) -> None:
    """The server does not listen on another port than the operator asked for."""
    status, output = said("paychan", command[0], system.directory / command[1], PORT="abc")

    assert status == 2
    assert 'PORT: "abc": want a port number' in output


@pytest.mark.parametrize(
    ("option", "url", "want"),
    [
        ("--electrum", "http://127.0.0.1:1", "tcp://host:port or ssl://host:port"),
        ("--node", "tcp://127.0.0.1:1", "want http://host[:port]"),
        ("--node", "http://[::1", "want http://host[:port]"),
    ],
)
def test_fault_55_a_payer_s_url_is_checked_as_well(tmp_path: Path, option: str, url: str, want: str) -> None:
    """A URL of the payer's own chain gets a sentence, too."""
    with System(tmp_path / "system") as system:
        wallet = ("--wallet", tmp_path / "wallet")
        assert said("paychan", "channel", "new", system.url, "--debug", *wallet)[0] == 0
        name = next((tmp_path / "wallet").glob("*.json")).stem
        file = tmp_path / "cookie"
        file.write_text("u:p")
        status, output = said("paychan", "channel", "refund", name, option, url, "--credentials", file, *wallet)

    assert status == 1
    assert want in output
    assert "Traceback" not in output
