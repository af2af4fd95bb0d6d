"""Threat 26: all input of the socket is a request or a `WireError`, decided quickly and in little memory."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from paychan.protocol.wire.signer_messages import MAX_FRAME_BYTES, Request
from paychan.protocol.wire.signer_versions import VERSION
from tests.signer.fuzz import MEMORY_BYTES, MEMORY_FACTOR, VALID, check, check_prefix, frames, memory_of

COUNT = 20_000


def test_threat_26_no_frame_makes_the_parser_fail() -> None:
    """Twenty thousand wrong frames of all kinds (`python -m tests.signer.fuzz` makes more) are decoded or refused."""
    outcomes = Counter(check(body) for body in frames(COUNT))

    assert outcomes.total() == COUNT
    assert outcomes["refused"] > COUNT / 2
    assert set(outcomes) == {"refused", *(kind.__name__ for kind in Request.__args__)}, "each message is reached"


def test_right_frames_are_read() -> None:
    """The frames that the wrong ones are made from are valid."""
    assert "refused" not in {check(body) for body in VALID}


def test_no_length_makes_the_parser_fail() -> None:
    """Any four bytes are a length within bounds, or refused."""
    chance = random.Random(1)
    for _ in range(COUNT):
        check_prefix(chance)


def test_threat_26_no_frame_takes_much_memory() -> None:
    """While a frame is decoded, memory grows with its size, whatever sizes it announces."""
    for body in frames(1_000, seed=2):
        assert memory_of(body) < MEMORY_FACTOR * len(body) + MEMORY_BYTES


@pytest.mark.parametrize("pattern", ["00", "cd1234", "cfffffffffffffffff", "91", "81a161", "930701", "c0", "c40100"])
def test_largest_frames_are_read_soon(pattern: str) -> None:
    """A frame of the largest size, filled with one repeated value at any place, takes little time and memory."""
    repeated = bytes.fromhex(pattern)
    count = (MAX_FRAME_BYTES - 100) // len(repeated)
    array = b"\xdd" + count.to_bytes(4, "big") + repeated * count
    for before in (b"", b"\x94\x06\x01\xc4\x00", b"\x95\x03\x01", b"\x93\x07\x01", b"\x94\x04\x01"):
        body = bytes([VERSION]) + before + array
        check(body)
        assert memory_of(body) < MEMORY_FACTOR * len(body) + MEMORY_BYTES
