"""`paychan up` on a copy of config/debug or another directory, as a new user runs it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from paychan.running import Running, read_running
from tests.lib.settings import with_settings
from tests.lib.system import Daemon

SHIPPED = Path(__file__).parents[2] / "config" / "debug"

_PATIENCE_SECONDS = 90.0


class Up:
    """A directory with both files, on free ports and with its own state directory, and the command running on it."""

    def __init__(self, directory: Path, shipped: Path = SHIPPED) -> None:
        self.directory = directory / "config"
        self.directory.mkdir(parents=True)
        self.state = directory / "state"
        self.log = directory / "up.log"
        self.command: Daemon | None = None
        for name in ("server.toml", "signer.toml"):
            ports = {"http.port": 0, "management.port": 0} if name == "server.toml" else {}
            text = with_settings((shipped / name).read_text(), {"state_dir": str(self.state), **ports})
            (self.directory / name).write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        """Change a setting."""
        file = self.directory / name
        text = file.read_text()
        assert old in text, f"{old} is not in {file}"
        file.write_text(text.replace(old, new))

    def set(self, name: str, key: str, value: object) -> None:
        """Change a setting that the shipped file leaves at its default."""
        file = self.directory / name
        file.write_text(with_settings(file.read_text(), {key: value}))

    def start(self, **environment: str) -> None:
        self.log.unlink(missing_ok=True)
        self.command = Daemon(self.log, "paychan", "up", str(self.directory), COLUMNS="200", **environment)

    def wait_until_serving(self) -> Running:
        """Wait for the panel, and return the server's URL."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while "Ctrl-C stops" not in self.text():
            assert self.status() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        running = read_running(self.state)
        assert running is not None
        return running

    def children(self) -> dict[str, psutil.Process]:
        """Signer and server by the name of their command."""
        assert self.command is not None
        processes = psutil.Process(self.command.process.pid).children()
        return {Path(process.cmdline()[1]).name: process for process in processes}

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def status(self) -> int | None:
        assert self.command is not None
        return self.command.process.poll()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to the command only, and return its exit status."""
        assert self.command is not None
        return self.command.stop(number)

    def wait(self) -> int:
        """Wait until the command has ended by itself."""
        assert self.command is not None
        return self.command.process.wait(_PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.command is not None and self.status() is None:
            self.end()
        if kind is not None:
            print(self.text())
