"""Outpoints: the conversion between displayed txids and internal bytes (RBPCP §1, §6.2)."""

from __future__ import annotations

import pytest

from paychan.protocol.errors import Malformed
from paychan.protocol.types import OutPoint
from tests.lib.looped import looped

SHOWN = "5e6abddf6d1842ed39fccff7c8b9f2590e5fa030c5c0cafc663073ad4390d404"


def test_a_displayed_txid_is_held_reversed() -> None:
    """A txid is shown reversed and stored in internal order, and is shown again as it was read."""
    outpoint = OutPoint.parse(SHOWN, 2)

    assert outpoint.txid == bytes.fromhex(SHOWN)[::-1]
    assert outpoint.txid_hex == SHOWN
    assert str(outpoint) == f"{SHOWN}:2"


def test_serialized_as_in_an_input() -> None:
    """36 bytes: the internal hash, and the index little endian."""
    assert OutPoint.parse(SHOWN, 0x01020304).serialize().hex() == bytes.fromhex(SHOWN)[::-1].hex() + "04030201"


def test_reversed_is_the_same_index_of_the_other_reading() -> None:
    """A client that writes internal order means the reversed txid; reversing twice gives the first one."""
    outpoint = OutPoint.parse(SHOWN, 2)

    assert outpoint.reversed == OutPoint.parse(bytes.fromhex(SHOWN)[::-1].hex(), 2)
    assert outpoint.reversed.reversed == outpoint


@looped("txid", ["", SHOWN[1:], SHOWN + "0", SHOWN.upper(), " " + SHOWN[1:], SHOWN + "\n", "\u0661" * 64])
def test_threat_27_other_txids_are_refused(txid: str) -> None:
    """A txid is 64 lower-case hex digits."""
    with pytest.raises(Malformed, match="funding_txid"):
        OutPoint.parse(txid, 0)


@looped("vout", [0, 2**32 - 1])
def test_both_ends_of_the_index_are_read(vout: int) -> None:
    """The first and the last index are accepted."""
    assert OutPoint.parse(SHOWN, vout).vout == vout


@looped("vout", [-1, 2**32])
def test_threat_40_other_indexes_are_refused(vout: int) -> None:
    """An index has 32 bits, and the refusal has both numbers."""
    with pytest.raises(Malformed, match=f"got {vout}, want 0 to 4294967295"):
        OutPoint.parse(SHOWN, vout)
