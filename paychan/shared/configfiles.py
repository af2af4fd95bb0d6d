"""Finds the settings file that a command wants: the argument may be the file, its directory or its neighbour.

The package carries one directory of settings for each network, with server.toml and signer.toml.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

NETWORKS = ("debug", "regtest", "test", "live")

_PACKAGE = Path(__file__).parents[1]
_IN_WHEEL = _PACKAGE / "shipped"
"""`pyproject.toml` copies the repository's `config` to this directory when a wheel is built."""


class Kind(NamedTuple):
    """A kind of settings file: its name, and the program that reads it."""

    name: str
    reader: str


SERVER = Kind("server.toml", "server")
SIGNER = Kind("signer.toml", "signer")


class NoSettings(Exception):
    """The argument leads to no settings file of the wanted kind; the text says which file is wanted."""


def shipped_directory(network: str) -> Path | None:
    """Find the directory of a network's configuration; None if the name is no network.

    An installed wheel has the directory inside the package, a clone beside it.
    """
    if network not in NETWORKS:
        return None
    return (_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "config") / network


def find_settings(given: Path, wanted: Kind) -> Path:
    """Return the file of the wanted kind that an argument means.

    The argument is the file itself, under any name; a directory; the other program's file beside it; or the name of a
    network, for the settings that the package carries, unless a file or directory has that name.

    Raises:
        NoSettings: there is no such file.
    """
    try:
        return _found(given, wanted)
    except OSError as error:
        msg = f"{given} can't be read: {error.strerror}. {_wants(wanted)}"
        raise NoSettings(msg) from None


def _found(given: Path, wanted: Kind) -> Path:
    other = SIGNER if wanted is SERVER else SERVER
    if given.is_dir():
        file = given / wanted.name
    elif not given.exists() and (shipped := shipped_directory(str(given))) is not None:
        file = shipped / wanted.name
    elif given.name == other.name and given.exists():
        file = given.with_name(wanted.name)
        if not file.exists():
            msg = f"{given} is the file of the {other.reader}, and there is no {file}. {_wants(wanted)}"
            raise NoSettings(msg)
    else:
        file = given
    if not file.exists():
        msg = f"{file}: no such file. {_wants(wanted)}"
        raise NoSettings(msg)
    return file


def _wants(wanted: Kind) -> str:
    return f"This command reads the settings of the {wanted.reader}: give {wanted.name} or its directory"
