"""Secrets in memory are overwritten where Python allows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from signer.secret.wiping import read_secret, wipe, wiped


def test_wiped_buffers_are_zeros_of_the_same_length() -> None:
    """Wiping overwrites in place, also for a view of the buffer, and nothing is left at the address."""
    secret, empty = bytearray(b"correct horse"), bytearray()
    view = memoryview(secret)

    wipe(secret, empty)

    assert secret == bytes(13) == view.tobytes()
    assert empty == b""


def test_the_end_of_a_block_wipes_also_after_an_error() -> None:
    """A block that raises leaves zeros too."""
    secret = bytearray(b"correct horse")

    with pytest.raises(ZeroDivisionError), wiped(secret):
        secret[0] //= 0

    assert secret == bytes(13)


@pytest.mark.parametrize("size", [0, 1, 12, 13, 14, 5000])
def test_a_secret_is_read_to_its_end_or_to_the_limit(tmp_path: Path, size: int) -> None:
    """A file is read whole up to the limit and not beyond, into memory that can be wiped."""
    content = os.urandom(size)
    file = tmp_path / "secret"
    file.write_bytes(content)
    descriptor = os.open(file, os.O_RDONLY)

    secret = read_secret(descriptor, 13)

    os.close(descriptor)
    assert isinstance(secret, bytearray)
    assert secret == content[:13]


def test_pieces_of_a_pipe_are_put_together() -> None:
    """A secret that arrives in pieces, as from a pipe, is read whole."""
    out, into = os.pipe()
    os.write(into, b"correct ")
    os.write(into, b"horse")
    os.close(into)

    assert read_secret(out, 64) == b"correct horse"
    os.close(out)


def test_an_unreadable_descriptor_raises() -> None:
    """A descriptor that can't be read is an OSError for the caller."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_secret(-1, 13)
