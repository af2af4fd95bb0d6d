"""The file by which commands find a running server: its process id and its URLs."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

_NAME = "running.json"


class Running(Struct, frozen=True):
    """A listening server: process id, and the URLs by which clients and the operator reach it from this machine."""

    pid: int
    url: str
    management_url: str
    gateway_url: str = ""


def write_running(state_dir: Path, running: Running) -> None:
    """Write this server's process id and URLs; replaces those of the previous start."""
    temporary = state_dir / f"{_NAME}.new"
    temporary.write_bytes(msgspec.json.encode(running))
    temporary.replace(state_dir / _NAME)


def read_running(state_dir: Path) -> Running | None:
    """Return the data of the last server that started, or None; that server may have ended since."""
    try:
        return msgspec.json.decode((state_dir / _NAME).read_bytes(), type=Running)
    except (OSError, msgspec.MsgspecError):
        return None


def remove_running(state_dir: Path) -> None:
    """Remove the file: the server listens no longer."""
    (state_dir / _NAME).unlink(missing_ok=True)
