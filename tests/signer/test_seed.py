"""The seed file: what is refused, and that a new one is private and never replaces another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from signer.keys import DEBUG_KEY
from signer.seed import SeedError, create_seed, read_seed

HEX = "00112233445566778899aabbccddeeff" * 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "signer.seed"
    path.touch(0o600)
    path.write_text(HEX + "\n")
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_private_file_is_read(file: Path, mode: int) -> None:
    """64 hex digits in a file that only its owner can use are a seed, with or without a final newline."""
    file.chmod(mode)
    assert read_seed(file) == bytes.fromhex(HEX)

    file.chmod(0o600)
    file.write_text(HEX)
    assert read_seed(file) == bytes.fromhex(HEX)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666, 0o700 | 0o010])
def test_file_that_others_can_use_is_refused(file: Path, mode: int) -> None:
    """Any right of group or others on the file is refused, and the mend is said."""
    file.chmod(mode)
    with pytest.raises(SeedError, match=f"mode {mode:04o}.*chmod 600"):
        read_seed(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_file_of_somebody_else_is_refused(file: Path) -> None:
    """A seed file that belongs to another user is refused, even when it can be read."""
    os.chown(file, 12345, -1)
    with pytest.raises(SeedError, match=r"belongs to uid 12345.*chown"):
        read_seed(file)


def test_link_is_refused(file: Path, tmp_path: Path) -> None:
    """A symbolic link is not followed: what it points to may change hands."""
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(SeedError, match="can't be opened"):
        read_seed(link)


def test_pipe_and_directory_are_refused(tmp_path: Path) -> None:
    """Neither a pipe (without waiting for its writer) nor a directory is a seed file."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(SeedError, match="not a regular file"):
            read_seed(path)


@pytest.mark.parametrize(
    "content",
    ["", HEX[:-1], HEX + "0", HEX[:-1] + "g", HEX.upper(), f" {HEX}", f"{HEX}\n\n", f"0x{HEX[2:]}", HEX[:63] + "\n0"],
)
def test_anything_but_64_hex_digits_is_refused(file: Path, content: str) -> None:
    """Other content is refused without showing any of it."""
    file.write_text(content)
    with pytest.raises(SeedError, match="does not hold 64 lower-case hex digits") as refused:
        read_seed(file)
    assert HEX[:16] not in str(refused.value).lower()


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    """A missing seed names the two ways on: the backup, or a new one."""
    with pytest.raises(SeedError, match="restore it from the backup, or create a new one"):
        read_seed(tmp_path / "none")


def test_debug_key_is_no_seed(file: Path) -> None:
    """The publicly known debug key is refused as a seed."""
    file.write_text(DEBUG_KEY.hex())
    with pytest.raises(SeedError, match="publicly known"):
        read_seed(file)


def test_created_seed_is_private_and_readable(tmp_path: Path) -> None:
    """A new seed has mode 0600 whatever the umask, makes its directory private, and two of them differ."""
    previous = os.umask(0)
    try:
        create_seed(tmp_path / "state" / "a")
        create_seed(tmp_path / "state" / "b")
    finally:
        os.umask(previous)

    assert (tmp_path / "state" / "a").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert read_seed(tmp_path / "state" / "a") != read_seed(tmp_path / "state" / "b")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_existing_file_is_never_replaced(tmp_path: Path, make: Any) -> None:
    """Whatever already has the name, a file, a directory or a dangling link, is left alone."""
    path = tmp_path / "taken"
    make(path)
    before = path.lstat()
    with pytest.raises(SeedError, match="exists already and was left alone"):
        create_seed(path)
    assert path.lstat() == before
