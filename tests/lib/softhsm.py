"""A real token without hardware: SoftHSM in its own directory. For tests and `bench/`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PIN = "1234567890"
LABEL = "paychan"
DESTINATION = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"

_MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib64/libsofthsm2.so")


class SoftHsm:
    """One token. With `environment`, a process that loads `module` uses it."""

    def __init__(self, directory: Path, label: str = LABEL, pin: str = PIN) -> None:
        self.directory = directory
        self.label = label
        self.pin = pin
        self.pin_file = directory / "pin"
        self.module = find_module()
        self.configuration = directory / "softhsm2.conf"
        self.environment = {"SOFTHSM2_CONF": str(self.configuration)}
        self._make()

    @property
    def signer_config(self) -> str:
        """The text of signer.toml, without `state_dir`; lines for [pkcs11] may be added at its end."""
        return (
            f'network = "regtest"\n[key]\nmode = "pkcs11"\n'
            f'[settlement]\ndestination_address = "{DESTINATION}"\n'
            f'[pkcs11]\nmodule = "{self.module}"\ntoken = "{self.label}"\npin_file = "{self.pin_file}"\n'
        )

    def add_token(self, label: str) -> None:
        """Make a further token beside the first."""
        command = ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", self.pin, "--so-pin", self.pin]
        subprocess.run(command, env=os.environ | self.environment, check=True, capture_output=True)

    def _make(self) -> None:
        tokens = self.directory / "tokens"
        tokens.mkdir(parents=True)
        self.configuration.write_text(
            f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        self.pin_file.write_text(self.pin + "\n")
        self.pin_file.chmod(0o600)
        self.add_token(self.label)


def find_module() -> Path | None:
    """Return the path of SoftHSM's library, if it is installed."""
    found = (Path(path) for path in _MODULES if Path(path).exists() and shutil.which("softhsm2-util"))
    return next(found, None)


@contextmanager
def softhsm(directory: Path, pin: str = PIN) -> Iterator[SoftHsm]:
    """A token that this process may use as well; afterwards the library is unloaded from it."""
    if find_module() is None:
        pytest.skip("no SoftHSM: apt install softhsm2 (tests/system-packages)")
    token = SoftHsm(directory, pin=pin)
    before = os.environ.get("SOFTHSM2_CONF")
    os.environ.update(token.environment)
    try:
        yield token
    finally:
        finalize(token)
        if before is None:
            del os.environ["SOFTHSM2_CONF"]
        else:
            os.environ["SOFTHSM2_CONF"] = before


def finalize(token: SoftHsm) -> None:
    """Finalise the library in this process, like the end of the process would."""
    ctypes.CDLL(str(token.module)).C_Finalize(None)
