"""`paychan up` on a terminal, while the signer asks for the passphrase of its seed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.functional.upprocess import SHIPPED, Up
from tests.lib.customer import wait_for
from tests.lib.pseudoterminal import PseudoTerminal
from tests.lib.softhsm import SoftHsm, find_module
from tests.signer.place import WORD, Place, private, recovered

COMMAND = Path(sys.executable).with_name("paychan")
SIGNER = COMMAND.with_name("paychan-signer")

_LONGER_SECONDS = 12.0
"""More than the 10 s after which `up` reports a part that does not answer."""

TYPED = "half of a secre"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A directory for `paychan up`, whose signer asks for the passphrase of its seed."""
    up = Up(tmp_path, SHIPPED.with_name("regtest"))
    up.edit("signer.toml", "create_if_missing = true", "create_if_missing = false")
    return recovered(Place(up.directory / "signer.toml", up.state / "signer.seed", private(tmp_path / "p", WORD)))


def shell(*command: str | Path) -> PseudoTerminal:
    """Return a shell that runs a command, shows the terminal's modes, and then reads a line as its next command."""
    words = " ".join(shlex.quote(str(word)) for word in command)
    return PseudoTerminal(["/bin/sh", "-c", f"trap : INT QUIT; {words}; stty -a; read -r line; echo got:[$line]"])


def processes(terminal: PseudoTerminal, name: str) -> Iterator[psutil.Process]:
    for each in psutil.Process(terminal._pid).children(recursive=True):
        if len(each.cmdline()) > 1 and Path(each.cmdline()[1]).name == name:
            yield each


def test_fault_46_up_waits_as_long_as_the_signer_asks(place: Place) -> None:
    """Nothing is written into the question, the passphrase is not shown, and after it both start."""
    with shell(COMMAND, "up", place.file.parent) as terminal:
        terminal.read_until("Passphrase of [^:]+: ")
        shown = len(terminal.output)
        time.sleep(_LONGER_SECONDS)
        terminal.enter(WORD)
        terminal.read_until("Ctrl-C stops signer and server")
        terminal.press_control_c()
        terminal.read_until("got|baud")
        terminal.enter("next")
        terminal.read_until(r"got:\[next\]")
    after = terminal.output[shown:]

    assert "signer started" in after.split("\n", 2)[1], after
    assert WORD not in terminal.output


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL], ids=lambda each: each.name
)
def test_fault_46_a_signal_at_the_question_leaves_the_terminal_with_echo(place: Place, number: signal.Signals) -> None:
    """The echo is on again, and what was typed is not given to the shell."""
    with shell(COMMAND, "up", place.file.parent) as terminal:
        terminal.read_until("Passphrase of [^:]+: ")
        os.write(terminal._terminal, TYPED.encode())
        (command,) = processes(terminal, "paychan")
        (signer,) = processes(terminal, "paychan-signer")
        command.send_signal(number)
        wait_for(lambda: not signer.is_running(), "the end of the signer")
        modes(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT], ids=lambda each: each.name)
@pytest.mark.parametrize("command", ["", "verify", "passphrase"])
def test_fault_46_a_signal_to_the_signer_alone_restores_the_echo(
    place: Place, number: signal.Signals, command: str
) -> None:
    """The same for the signer without `up`, and for its commands that ask for the passphrase."""
    with shell(SIGNER, *([command] if command else []), place.file) as terminal:
        terminal.read_until("Passphrase of [^:]+: ")
        os.write(terminal._terminal, TYPED.encode())
        (signer,) = processes(terminal, "paychan-signer")
        signer.send_signal(number)
        modes(terminal)


def test_fault_46_a_killed_signer_leaves_the_terminal_with_echo(place: Place) -> None:
    """A signer that can restore nothing ends `up`, which does."""
    with shell(COMMAND, "up", place.file.parent) as terminal:
        terminal.read_until("Passphrase of [^:]+: ")
        os.write(terminal._terminal, TYPED.encode())
        (signer,) = processes(terminal, "paychan-signer")
        signer.kill()
        terminal.read_until("paychan-signer ended with status -9")
        modes(terminal)


def modes(terminal: PseudoTerminal) -> None:
    """Check that the shell that comes back has the echo, and reads nothing that was typed for the signer."""
    terminal.read_until(r"speed .* baud.*-tostop")
    assert termios.tcgetattr(terminal._terminal)[3] & termios.ECHO
    terminal.enter("next")
    terminal.read_until(r"got:\[next\]")
    assert TYPED not in terminal.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda each: each.name)
@pytest.mark.skipif(find_module() is None, reason="SoftHSM is not installed")
def test_fault_46_a_token_s_pin_is_asked_for_in_the_same_way(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token's process asks; it restores the echo although only the signer gets the signal."""
    token = SoftHsm(tmp_path / "token")
    for name, value in token.environment.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "signer.toml"
    text = re.sub("pin_file.*", "", token.signer_config)
    file.write_text(f'state_dir = "{tmp_path}/state"\n{text}')
    with shell(SIGNER, file) as terminal:
        terminal.read_until("Pin of [^:]+: ")
        os.write(terminal._terminal, TYPED.encode())
        *_, token_process = processes(terminal, "paychan-signer")
        next(processes(terminal, "paychan-signer")).send_signal(number)
        wait_for(lambda: not token_process.is_running(), "the end of the token's process")
        modes(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda each: each.name)
def test_fault_46_a_signal_removes_the_words_from_the_screen(place: Place, number: signal.Signals) -> None:
    """The page with the backup words is cleared and left, also at the end by a signal."""
    place.seed.unlink()
    order = (SIGNER, "init", place.file, "--destination", "seed", "--passphrase-file", place.passphrase)
    with shell(*order) as terminal:
        terminal.read_until("Press Enter when you have written them down")
        (signer,) = processes(terminal, "paychan-signer")
        signer.send_signal(number)
        modes(terminal)
        left = terminal.text_left

    assert "abandon" not in left
    assert "shown only once" not in left
