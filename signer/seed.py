"""The seed file: the one secret on disk, 64 hex digits that only the signer's user can read."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from signer.keys import DEBUG_KEY

SEED_BYTES = 32

_SEED_HEX = re.compile(rb"[0-9a-f]{64}\n?")


class SeedError(Exception):
    """The seed can't be used, and what to do about it. Never holds anything of the file's content."""


def read_seed(path: Path) -> bytes:
    """Read the seed.

    Raises:
        SeedError: missing, not a private regular file of ours, or not 64 lower-case hex digits.
    """
    try:
        # O_NOFOLLOW: a link could point to a file that others write; O_NONBLOCK: a pipe must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        msg = f"there is no {path}: restore it from the backup, or create a new one with `paychan-signer init FILE`"
        raise SeedError(msg) from None
    except OSError as error:
        msg = f"{path} can't be opened: {error.strerror}"
        raise SeedError(msg) from None
    try:
        problem = _file_problem(os.fstat(descriptor))
        if problem:
            msg = f"{path} {problem}"
            raise SeedError(msg)
        return _parse(path, os.read(descriptor, 2 * SEED_BYTES + 2))
    finally:
        os.close(descriptor)


def create_seed(path: Path) -> None:
    """Draw a seed and write it durably to a new file, mode 0600.

    Raises:
        SeedError: there is a file already, which is left alone, or it can't be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(SEED_BYTES).encode() + b"\n")
            file.flush()
            os.fsync(descriptor)
        sync_directory(path.parent)
    except FileExistsError:
        msg = f"{path} exists already and was left alone: a new seed would lose the keys of open channels"
        raise SeedError(msg) from None
    except OSError as error:
        msg = f"{path} can't be created: {error.strerror}"
        raise SeedError(msg) from None


def _file_problem(status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_uid != os.geteuid():
        return f"belongs to uid {status.st_uid}, not to the signer's {os.geteuid()}: `chown` it"
    if status.st_mode & 0o077:
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, others can use it: `chmod 600` it"
    return ""


def _parse(path: Path, content: bytes) -> bytes:
    if not _SEED_HEX.fullmatch(content):
        msg = f"{path} does not hold 64 lower-case hex digits and nothing else: restore it from the backup"
        raise SeedError(msg)
    seed = bytes.fromhex(content.decode())
    if seed == DEBUG_KEY:
        msg = f"{path} holds the publicly known debug key: create a seed of your own"
        raise SeedError(msg)
    return seed


def sync_directory(path: Path) -> None:
    """Make the new name itself survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
