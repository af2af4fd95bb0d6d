"""A walk over the channels of which payments were shown: the server finds out what its store lacks."""

from __future__ import annotations

import plyvel

from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint
from signer.ledger.base import LedgerFailed
from signer.ledger.entries import DamagedEntry, decode_entry

_PREFIX, _END = b"w", b"x"
_TXID_BYTES = 32
_KEY_BYTES = len(_PREFIX) + 36


def shown_after(database: plyvel.DB, after: OutPoint | None, limit: int) -> list[tuple[OutPoint, Claim | None]]:
    """Read the newest claims that were shown, in the order of their keys, behind an outpoint; None: it is damaged.

    Raises:
        LedgerFailed: a part of the ledger can't be read.
    """
    begin = _PREFIX if after is None else _PREFIX + after.serialize()
    found: list[tuple[OutPoint, Claim | None]] = []
    try:
        with database.iterator(start=begin, stop=_END, include_start=after is None, verify_checksums=True) as entries:
            for key, raw in entries:
                if len(key) != _KEY_BYTES:  # a signed settlement of a txid that begins with the same byte
                    continue
                place = key[len(_PREFIX) :]
                outpoint = OutPoint(place[:_TXID_BYTES], int.from_bytes(place[_TXID_BYTES:], "little"))
                found.append((outpoint, _readable(raw)))
                if len(found) == limit:
                    break
    except plyvel.Error as error:
        msg = f"the payments that were shown can't be read ({error})"
        raise LedgerFailed(msg) from error
    return found


def _readable(raw: bytes) -> Claim | None:
    try:
        return decode_entry(raw, Claim)
    except DamagedEntry:
        return None
