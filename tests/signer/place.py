"""A configuration in a separate directory, and the key commands, called as a script calls them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from unittest import mock

from typer.testing import CliRunner

from signer.cli import rotate as rotation
from signer.cli import seed as commands
from signer.commands import app
from signer.secret.sources import Secret
from signer.seed import open as keystore
from signer.seed.encryption import Cost
from signer.seed.file import Seed, read_seeds

CHEAP = Cost(2)
"""Used by commands in the test's process; the console script takes a second for each passphrase."""

WORD = "correct horse battery staple"
ABANDON = "abandon " * 11 + "about"


class Place(NamedTuple):
    """A configuration, and the paths of its seed and passphrase."""

    file: Path
    seed: Path
    passphrase: Path

    def seeds(self, passphrase: str = WORD) -> tuple[Seed, ...]:
        with Secret(bytearray(passphrase.encode())) as secret:
            return read_seeds(self.seed, secret)


def make_place(directory: Path, mode: str = "hardened", rest: str = "") -> Place:
    file = directory / "signer.toml"
    file.write_text(f'network = "regtest"\nstate_dir = "{directory}"\n[key]\nmode = "{mode}"\n{rest}')
    return Place(file, directory / "signer.seed", private(directory / "passphrase", WORD))


def private(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


class Result(NamedTuple):
    status: int
    output: str


def call(*arguments: str | Path, text: str = "") -> Result:
    """Run a command in this process; the seed files that it writes have a cheap key."""
    with (
        mock.patch.object(commands, "CHOSEN", CHEAP),
        mock.patch.object(rotation, "CHOSEN", CHEAP),
        mock.patch.object(keystore, "CHOSEN", CHEAP),
    ):
        result = CliRunner().invoke(app, [str(each) for each in arguments], input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, " ".join(result.output.split()))


def run(place: Place, command: str, *options: str, text: str = "") -> Result:
    """Run a command on the configuration, with the passphrase from its file."""
    return call(*command.split(), place.file, *options, "--passphrase-file", place.passphrase, text=text)


def recovered(place: Place, words: str = ABANDON) -> Place:
    assert run(place, "recover", text=words).status == 0
    return place
