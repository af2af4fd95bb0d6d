"""A real `paychan-signer` over its real socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from signer.secret.sources import Secret
from signer.seed.file import read_seeds

REGTEST = 'network = "regtest"\n[key]\nmode = "hardened"\ncreate_if_missing = true\n'

DEBUG = (
    'network = "test"\ndebug = true\n[key]\nmode = "debug"\n'
    '[settlement]\ndestination_address = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"\n'
)

COMMAND = Path(sys.executable).with_name("paychan-signer")

_START_SECONDS = 90.0


class SignerProcess:
    """Runs the console script in its own directory: `with SignerProcess(tmp_path) as signer: signer.socket`.

    `config` is the text of signer.toml. It must not set `state_dir` and `socket.path`, which follow from `directory`.
    """

    def __init__(self, directory: Path, config: str = REGTEST) -> None:
        self.directory = directory
        self.file = directory / "signer.toml"
        self.socket = directory / "signer.sock"
        self.seed = directory / "signer.seed"
        self.passphrase = directory / "signer.passphrase"
        self.log = directory / "signer.log"
        self.file.write_text(f'state_dir = "{directory}"\n{config}')
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def master(self) -> bytes:
        """The secret from which the keys of the newest seed are derived."""
        with Secret(bytearray(self.passphrase.read_bytes().strip())) as passphrase:
            return read_seeds(self.seed, passphrase)[0].master

    def start(self, *command: str) -> None:
        """Start, with another command if given, and wait until the socket answers.

        Raises:
            RuntimeError: the process ended instead; the text is its output.
        """
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*(command or (COMMAND,)), self.file], cwd=self.directory, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(self.log.read_text())
            time.sleep(0.02)

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """Send SIGKILL, which leaves the socket file behind."""
        return self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Send SIGSTOP: connections are still accepted, but requests get no answer."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        return self.process.wait(_START_SECONDS)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
