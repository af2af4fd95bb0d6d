"""A command on a real terminal, and a simulated user who reads and types."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_PATIENCE_SECONDS = 60.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_OWN_PAGE = re.compile(r"\x1b\[\?1049h.*?\x1b\[\?1049l", re.DOTALL)


class PseudoTerminal:
    """Runs a command on its own terminal: `with PseudoTerminal([COMMAND, "init", file]) as terminal:`."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._command = [str(part) for part in command]
        self._read_up_to = 0
        self.output = ""
        self.status: int | None = None

    def read_until(self, pattern: str) -> re.Match[str]:
        """Wait for a text beyond the output already read."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            found = re.search(pattern, self.output[self._read_up_to :], re.DOTALL)
            if found:
                self._read_up_to += found.end()
                return found
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.output}"
            assert self._read(), f"ended without {pattern!r}:\n{self.output}"

    def enter(self, text: str) -> None:
        """Type a line."""
        os.write(self._terminal, text.encode() + b"\r")

    def press_control_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def end_by_control_c(self) -> int:
        """Press Ctrl-C as a person does, again if nothing happens; return the exit status.

        Python notices a signal that arrives just before it waits for a key only after the next signal.
        """
        with contextlib.suppress(OSError):  # EIO: the command has ended
            self.press_control_c()
            shown = len(self.output)
            while self._read():
                if len(self.output) == shown:  # no output for a second
                    self.press_control_c()
                shown = len(self.output)
        return self.wait()

    def kill(self, number: int = signal.SIGTERM) -> None:
        os.kill(self._pid, number)

    def end_by(self, number: int) -> int:
        """Send a signal, again if nothing happens (see `end_by_control_c`); return the exit status."""
        self.kill(number)
        shown = len(self.output)
        while self._read():
            if len(self.output) == shown:
                self.kill(number)
            shown = len(self.output)
        return self.wait()

    def wait(self) -> int:
        """Read to the end, and return the exit status."""
        if self.status is None:
            while self._read():
                pass
            self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self.status

    @property
    def text(self) -> str:
        """The whole output, without control sequences."""
        return _CONTROL.sub("", self.output)

    @property
    def text_left(self) -> str:
        """The output that is still visible: the terminal's alternate screen is gone."""
        return _CONTROL.sub("", _OWN_PAGE.sub("", self.output))

    def _read(self) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], 1.0)
        if not ready:
            return True
        try:
            data = os.read(self._terminal, 1 << 16)
        except OSError:  # EIO: the command has closed the terminal
            return False
        self.output += data.decode()
        return bool(data)

    def __enter__(self) -> Self:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background shell ignores it
            os.environ.update(TERM="xterm-256color", COLUMNS="100")
            os.execv(self._command[0], self._command)
        return self

    def __exit__(
        self, error: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None and self.status is None:
            self.kill(signal.SIGKILL)
        self.wait()
        os.close(self._terminal)
