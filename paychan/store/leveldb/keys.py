"""Keys of the database: `c` outpoint → record; `i` state expiry outpoint → empty, the index that `scan` walks.

`n` outpoint sequence number → a message to the application that waits.
"""

from __future__ import annotations

from paychan.protocol.channel import State
from paychan.protocol.expiry import MAX_EXPIRY
from paychan.protocol.types import OutPoint

RECORD, INDEX, MESSAGE = b"c", b"i", b"n"

STATE_CODES = {State.OPEN: 1, State.CLOSING: 2, State.PUBLISHED: 3, State.CLOSED: 4, State.LOST: 5, State.UNFUNDED: 6}
"""Second byte of an index key. It is stored: never renumber."""

OUTPOINT_BYTES = 36


def index_begin(state: State, expiry: int) -> bytes:
    """Return the first key of the index entries of a state that expire at this time or later."""
    return INDEX + ((STATE_CODES[state] << 32) + min(max(expiry, 0), MAX_EXPIRY + 1)).to_bytes(5, "big")


def index_key(state: State, expiry: int, outpoint: bytes) -> bytes:
    """Return the index key of a channel; `expiry` is its lock time, `outpoint` is serialized."""
    return index_begin(state, expiry) + outpoint


def message_key(outpoint: bytes, seq: int, number: int) -> bytes:
    """Return the key of a message: messages of one channel are in the order of its changes.

    `seq` is the record's, `number` that of the message among those of the same change.
    """
    return MESSAGE + outpoint + seq.to_bytes(8, "big") + bytes([number])


def outpoint_of_message(key: bytes) -> OutPoint:
    """Return the channel that a message is about."""
    return read_outpoint(key[len(MESSAGE) : len(MESSAGE) + OUTPOINT_BYTES])


def read_outpoint(raw: bytes) -> OutPoint:
    """Read a serialized outpoint."""
    return OutPoint(raw[:32], int.from_bytes(raw[32:], "little"))
