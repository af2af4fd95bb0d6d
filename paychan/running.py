"""The file by which commands find a running server: its process, its URLs."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

_NAME = "running.json"


class Running(Struct, frozen=True):
    """A server that listens: process id, and where clients and operator reach it from this machine."""

    pid: int
    url: str
    management_url: str


def write_running(state_dir: Path, running: Running) -> None:
    """Tell where we are; replaced at every start."""
    temporary = state_dir / f"{_NAME}.new"
    temporary.write_bytes(msgspec.json.encode(running))
    temporary.replace(state_dir / _NAME)


def read_running(state_dir: Path) -> Running | None:
    """Return what the last server said; it may have died since."""
    try:
        return msgspec.json.decode((state_dir / _NAME).read_bytes(), type=Running)
    except (OSError, msgspec.MsgspecError):
        return None


def remove_running(state_dir: Path) -> None:
    """Say that nobody listens any more."""
    (state_dir / _NAME).unlink(missing_ok=True)
