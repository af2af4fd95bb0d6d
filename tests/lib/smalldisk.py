"""A file system of a few megabytes that a test can fill."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_file_system(directory: Path, mib: int = 4) -> Iterator[Path]:
    """Mount one at a new directory; skip the test if the system does not allow that."""
    directory.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", directory]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def fill(file: Path, leave_bytes: int = 0) -> None:
    """Fill the file system, except for some bytes."""
    with file.open("wb", buffering=0) as opened, suppress(OSError):
        while True:
            opened.write(bytes(4096))
    with file.open("r+b") as opened:
        opened.truncate(max(0, file.stat().st_size - leave_bytes))
