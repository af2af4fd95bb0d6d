"""Mistakes of an operator at the start of server and signer: the reason is named at once, and is the true one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitcoin.core import CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript

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


@pytest.mark.parametrize(
    ("listen", "key"), [("no-such-host.invalid", "http"), ("192.0.2.9", "http"), ("192.0.2.9", "management")]
)
def test_an_address_that_this_machine_has_not_is_named(system: System, listen: str, key: str) -> None:
    """Another port would not help: the sentence names the setting of the address."""
    text = system.server_file.read_text()
    sections = (f"[{key}]\n", f'[{key}]\nlisten = "{listen}"\n')
    system.server_file.write_text(text.replace(*sections) if sections[0] in text else text + sections[1])
    signer = Daemon(system.directory / "signer.log", "paychan-signer", str(system.signer_file))
    try:
        status, output = said("paychan", "serve", system.server_file)
    finally:
        signer.stop()

    assert status == 2, output
    assert f"this machine has no address {listen}. Change {key}.listen" in output
    assert "PORT" not in output


def test_a_state_directory_that_is_a_file_is_named(system: System, tmp_path: Path) -> None:
    """The remedy is another name: no command makes a directory of a file."""
    wrong = tmp_path / "state file"
    wrong.write_text("")
    text = re.sub(r"(?m)^state_dir = .*$", f'state_dir = "{wrong}"', system.server_file.read_text())
    system.server_file.write_text(text)
    status, output = said("paychan", "serve", system.server_file)

    assert status == 2, output
    assert f"{wrong} is a file: name a directory in state_dir" in output
    assert "install" not in output


def test_settling_without_a_signer_names_the_signers_settings(system: System) -> None:
    """The command to paste starts the signer with its own settings, not with those of the server."""
    with system:
        assert said("paychan", "backup", "create", system.server_file)[0] == 0
    (backup,) = (system.state / "backups").glob("*.backup")
    status, output = said("paychan", "settle", "--offline", backup, "--config", system.server_file)

    assert status == 1, output
    assert f"paychan-signer {system.server_file.parent}`" in output


def test_a_file_that_is_no_transaction_is_named(system: System, tmp_path: Path) -> None:
    """`paychan coins --publish` says which file is wrong, and what it should hold; so does the file of addresses."""
    raw = CTransaction([CTxIn(), CTxIn()], [CTxOut(1, CScript([1, 2]))]).serialize().hex()
    wrong = {"empty": b"", "words": b"nothing\n", "binary": bytes(range(256)), "none": b"0200000000000000000000"}
    wrong |= {f"cut at {end}": raw[:end].encode() for end in (1, 2, 8, 10, 30, len(raw) - 1, len(raw) - 8)}
    wrong |= {"more": (raw + "00").encode()}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for file in (*(tmp_path / name for name in wrong), tmp_path / "folder", tmp_path / "absent", Path("/dev/null")):
        status, output = said("paychan", "coins", system.server_file, "--publish", file)

        assert status == 2, output
        assert str(file) in output.replace("\n", "")
        assert "It should hold one signed transaction in hex" in output
        assert "Traceback" not in output
    for file in (tmp_path / "binary", tmp_path / "folder"):
        status, output = said("paychan", "coins", system.server_file, file)

        assert status == 2, output
        assert f"{file}" in output
        assert "It should hold one address a line" in output


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_status_survives_a_reader_of_one_line(system: System, options: tuple[str, ...]) -> None:
    """A closed pipe hides no critical state, and is no warning; other commands end as after SIGPIPE."""

    def ended(*command: object) -> tuple[int, str]:
        reading, writing = os.pipe()
        os.close(reading)
        program = [PROGRAMS / str(command[0]), *map(str, command[1:])]
        done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=30)
        os.close(writing)
        return done.returncode, done.stderr

    with system:
        assert ended("paychan", "status", system.server_file, *options) == (0, "")
        assert ended("paychan", "channels", "list", system.server_file, *options) == (141, "")
        assert ended("paychan-signer", "status", system.signer_file, *options) in ((0, ""), (141, ""))
        system.signer.stop()
        deadline = time.monotonic() + 20
        while said("paychan", "status", system.server_file)[0] != 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert ended("paychan", "status", system.server_file, *options) == (2, "")
