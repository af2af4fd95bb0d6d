"""Debug funding: an outpoint derived from client key and expiry, accepted without a chain (RBPCP §10.2)."""

from __future__ import annotations

from hashlib import sha256

from paychan.protocol.types import OutPoint, Sat, UnixTime

DEBUG_FUNDING_SAT = Sat(12_345_678_900_000)


def debug_outpoint(client_key: bytes, expiry: UnixTime) -> OutPoint:
    """Derive the outpoint: its internal txid is one SHA256 of the key bytes, its index the expiry modulo 7."""
    return OutPoint(sha256(client_key).digest(), expiry % 7)
