"""The README's commands as newcomers meet them: terminals of any width, pipes, without colour, in ASCII, as any user.

Every command that is printed as the next one is pasted into a shell. No output cuts a name or shows a traceback.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.functional.upprocess import Up
from tests.lib.system import System

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_UNUSED_UID = 54_321
_PATIENCE_SECONDS = 60.0
_BEGINNING_CHARS = 12
"""Characters of a name that occur nowhere else."""


class Place(NamedTuple):
    """Surroundings of a command: columns of the terminal (None: a pipe), their environment, and the user (0: this one)."""

    columns: int | None
    environment: dict[str, str]
    uid: int = 0


PLACES = {
    "40 columns, UTF-8": Place(40, {"LC_ALL": "C.UTF-8"}),
    "60 columns, ASCII": Place(60, {"LC_ALL": "C"}),
    "80 columns, no colour": Place(80, {"NO_COLOR": "1"}),
    "200 columns": Place(200, {}),
    "pipe, ASCII": Place(None, {"LC_ALL": "C"}),
    "pipe, a user without a name and a home": Place(None, {"LC_ALL": "C.UTF-8"}, _UNUSED_UID),
}


class Shell:
    """Runs command lines in a directory with `.venv`, as in a clone, and checks every output."""

    def __init__(self, directory: Path, place: Place) -> None:
        self.directory, self.place = directory, place
        directory.mkdir()
        (directory / ".venv").symlink_to(Path(sys.executable).parents[1])
        self.names: set[str] = set()
        """Names, addresses, keys and paths that no output may cut."""
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "VIRTUAL_ENV")}
        home = {} if place.uid else {"HOME": str(directory)}
        self._environment = {**kept, **home, "TERM": "xterm-256color", **place.environment}
        self._user: list[str] = []
        if place.uid:
            os.chown(directory, place.uid, place.uid)
            capability = "+dac_read_search"  # reads the Python of another user's home, as from /usr
            caps = [f"--inh-caps={capability}", f"--ambient-caps={capability}"]
            self._user = ["setpriv", f"--reuid={place.uid}", f"--regid={place.uid}", "--clear-groups", *caps]

    def run(self, line: str, *, status: int = 0) -> str:
        """Run a line, and return its output without control sequences, checked."""
        with self.started(line) as (process, read):
            output = _CONTROL.sub("", read())
            assert process.wait(_PATIENCE_SECONDS) == status, output
        self.check(output)
        return output

    def check(self, output: str) -> None:
        """Check that nothing is cut, that there is no traceback, and that an ASCII terminal gets ASCII."""
        assert "Traceback" not in output, output
        assert "…" not in output, output
        assert "..." not in output, output
        for name in self.names:
            for found in re.finditer(re.escape(name[:_BEGINNING_CHARS]), output):
                assert output[found.start() :].startswith(name), output
        assert self.place.environment.get("LC_ALL") != "C" or output.isascii(), output

    def shows(self, line: str, *names: str) -> str:
        """Run a line whose output has these names."""
        output = self.run(line)
        for name in names:
            assert name in output, output
        return output

    def follow(self, output: str) -> str:
        """Paste the command that an output names as the next one; return its output."""
        command = re.search(r"(?m)^ *Next\s+(\S.*)$", output)
        assert command, output
        assert command[1].startswith(".venv/bin/paychan"), output
        return self.run(command[1].strip())

    @contextmanager
    def started(self, line: str) -> Iterator[tuple[subprocess.Popen[bytes], object]]:
        """Start a line in a terminal or a pipe; the function reads all of its output."""
        own, theirs = pty.openpty() if self.place.columns else os.pipe()
        if self.place.columns:
            termios.tcsetwinsize(theirs, (50, self.place.columns))
        process = subprocess.Popen(
            [*self._user, "bash", "-c", line],
            stdin=theirs if self.place.columns else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            cwd=self.directory,
            env=self._environment,
        )
        os.close(theirs)

        def read(until: str = "") -> str:
            output = b""
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while time.monotonic() < deadline and not (until and until in output.decode(errors="replace")):
                if not select.select([own], [], [], 1.0)[0]:
                    continue
                try:
                    data = os.read(own, 1 << 16)
                except OSError:  # EIO: the command has closed the terminal
                    break
                if not data:
                    break
                output += data
            return output.decode().replace("\r\n", "\n")

        try:
            yield process, read
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            os.close(own)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("shop")) as running:
        yield running


@pytest.fixture(params=PLACES)
def shell(request: pytest.FixtureRequest, tmp_path: Path, system: System) -> Shell:
    place = PLACES[request.param]
    if place.uid and (os.geteuid() or shutil.which("setpriv") is None):
        pytest.skip("only root can become another user, with setpriv")
    return Shell(tmp_path / "a clone", place)


def test_fault_44_52_each_printed_command_works_when_pasted(shell: Shell, system: System) -> None:
    """A payer follows the commands from the first to the last; names stay whole in all output on the way."""
    shown = shell.run(f".venv/bin/paychan channel new {system.url} --debug --wallet 'my wallet'")
    (channel,) = json.loads(shell.run(".venv/bin/paychan channel list --json --wallet 'my wallet'"))
    outpoint, address = channel["funding_outpoint"], channel["funding_address"]
    shell.names |= {outpoint, address, channel["change_address"]}
    shell.check(shown)
    assert outpoint in shown
    assert "1,000 sat" in shell.follow(shell.follow(shown))
    wallet = "--wallet 'my wallet'"
    shell.shows(f".venv/bin/paychan channel status {channel['name'][:4]} {wallet}", outpoint, address, "101,000 sat")
    shell.shows(f".venv/bin/paychan channel list {wallet}", channel["name"], "101,000 sat", system.url)
    shell.shows(f".venv/bin/paychan channel close {channel['name']} {wallet}", outpoint)
    nobody = shell.run(f".venv/bin/paychan channel pay nothing 1 {wallet}", status=1)
    assert f"`.venv/bin/paychan channel list {wallet}`" in nobody


def test_fault_44_52_the_operator_s_output_is_whole(shell: Shell, system: System) -> None:
    """Settings are given by file or directory; outpoints, paths and hashes are whole; a mistake gets a sentence."""
    if shell.place.uid:
        assert "is not readable" in shell.run(f".venv/bin/paychan-signer heartbeat {system.directory}", status=2)
        assert "PAYCHAN_WALLET" in shell.run(".venv/bin/paychan channel list", status=1)
        return
    live = shlex.quote(str(system.directory))
    (first, *_) = system.manage("GET", "/channels?state=closed&limit=1").json()["channels"] or [None]
    shell.shows(f".venv/bin/paychan status {live}", f"none in {system.state}/backups")
    if first:
        shell.names.add(first["funding_source"])
        shell.shows(f".venv/bin/paychan channels list {system.server_file} --state closed", first["funding_source"])
        shell.shows(f".venv/bin/paychan channels show {live} {first['funding_source'][:16]}", first["sender"])
    shell.shows(f".venv/bin/paychan-signer status {system.server_file}", "protections")
    shell.shows(f".venv/bin/paychan-signer audit show {live} --last 2")
    shell.shows(f".venv/bin/paychan settings {live}", "settlement.max_fee_sat_per_vb")
    shell.shows(".venv/bin/paychan channel refund --help", "--transaction", "PAYCHAN_CERTIFICATE")
    shown = shell.shows(".venv/bin/paychan init live 'my shop'", "my shop/server.toml")
    assert ".venv/bin/paychan-signer init 'my shop'" in shown
    missing = shell.run(".venv/bin/paychan status nowhere", status=3)
    assert "nowhere: no such file. This command reads the settings of the server: give server.toml" in missing


def test_fault_44_up_shows_the_whole_server_key_in_a_narrow_terminal(tmp_path: Path) -> None:
    """At 40 columns the key, the state directory and the next command are whole, and the command is called as typed."""
    up = Up(tmp_path)
    shell = Shell(tmp_path / "clone", PLACES["40 columns, UTF-8"])
    with shell.started(f".venv/bin/paychan up {up.directory}") as (process, read):
        output = _CONTROL.sub("", read("Ctrl-C stops"))
        process.send_signal(signal.SIGINT)
        read()
        assert process.wait(_PATIENCE_SECONDS) == 0
    shell.check(output)
    for name in (str(up.state), "\n.venv/bin/paychan channel new http://127.0.0.1:"):
        assert name in output
    assert re.search(r"Server key\s+0[23][0-9a-f]{64}\n", output), output
