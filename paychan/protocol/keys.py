"""Public keys: compressed points on secp256k1, as bytes and as text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

from coincurve import PublicKey
from msgspec import Meta

from paychan.protocol.errors import Malformed

_KEY_HEX = re.compile(r"0[23][0-9a-f]{64}")

GROUP_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""Order of the group of secp256k1 (SEC 2, 2.4.1): private keys and the numbers of a signature are below it."""

KeyBytes = Annotated[bytes, Meta(min_length=33, max_length=33)]


@lru_cache(10_000)
def parsed_key(raw: bytes) -> PublicKey:
    """Parse a point; the newest are cached, because parsing takes a third of a signature check. Raises `ValueError`."""
    return PublicKey(raw)


def check_public_key(raw: bytes, field: str = "client_pubkey") -> bytes:
    """Return a compressed point on secp256k1.

    Raises:
        Malformed: other length or prefix (coincurve also accepts hybrid and uncompressed keys), or not on the curve.
    """
    if len(raw) != 33 or raw[0] not in (2, 3):
        raise Malformed(field=field, reason="want a 33-byte compressed public key")
    try:
        parsed_key(raw)
    except ValueError:
        raise Malformed(field=field, reason="not a point on secp256k1") from None
    return raw


def parse_public_key(text: str, field: str = "client_pubkey") -> bytes:
    """Read 66 lower-case hex digits as a compressed point.

    Raises:
        Malformed: another text, or not on the curve.
    """
    if not _KEY_HEX.fullmatch(text):
        raise Malformed(field=field, reason="want 66 lower-case hex digits beginning with 02 or 03")
    return check_public_key(bytes.fromhex(text), field)
