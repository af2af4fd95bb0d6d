"""Keys of the database: `c` outpoint → record; `i` state expiry outpoint → empty, the index that `scan` walks."""

from __future__ import annotations

from paychan.protocol.channel import State
from paychan.protocol.expiry import MAX_EXPIRY

RECORD, INDEX = b"c", b"i"

STATE_CODES = {State.OPEN: 1, State.CLOSING: 2, State.PUBLISHED: 3, State.CLOSED: 4, State.LOST: 5, State.UNFUNDED: 6}
"""Second byte of an index key. It is stored: never renumber."""

OUTPOINT_BYTES = 36


def index_begin(state: State, expiry: int) -> bytes:
    """Return the first key of the index entries of a state that expire at this time or later."""
    return INDEX + ((STATE_CODES[state] << 32) + min(max(expiry, 0), MAX_EXPIRY + 1)).to_bytes(5, "big")


def index_key(state: State, expiry: int, outpoint: bytes) -> bytes:
    """Return the index key of a channel; `expiry` is its lock time, `outpoint` is serialized."""
    return index_begin(state, expiry) + outpoint
