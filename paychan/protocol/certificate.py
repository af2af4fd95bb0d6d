"""Certificates of receipt keys: the server's identity key, which the signer holds, vouches for a key that the server drew.

The identity key signs nothing else, and no other key of the signer signs certificates. The digest is a tagged hash as
in BIP340: no transaction and no other message has it.
"""

from __future__ import annotations

from hashlib import sha256

from coincurve import PublicKey
from msgspec import Struct

from paychan.protocol.errors import PaychanError
from paychan.protocol.keys import check_public_key
from paychan.protocol.types import UnixTime

TAG = "paychan/receipt-key"

MOST_SECONDS = 100 * 24 * 3600
"""Longest life of a certificate that the signer signs, and thus of a stolen receipt key."""

_TIME_BYTES = 8


class Certificate(Struct, frozen=True):
    """A statement of the identity key: in this time, inclusive, the receipt key signs receipts for it."""

    identity: bytes
    """The identity key, compressed."""
    receipt_key: bytes
    """Compressed."""
    not_before: UnixTime
    not_after: UnixTime
    signature: bytes
    """Of the identity key over `certificate_digest`: strict DER with low S."""

    def problem(self) -> str:
        """Say why the identity key did not sign this certificate; "" if it did."""
        try:
            check_public_key(self.identity, "identity key")
            check_public_key(self.receipt_key, "receipt key")
        except PaychanError as error:
            return str(error)
        if not 0 <= self.not_before <= self.not_after < 1 << 8 * _TIME_BYTES:
            return f"it is valid from {self.not_before} to {self.not_after}, which is no time"
        digest = certificate_digest(self.receipt_key, self.not_before, self.not_after)
        return "" if is_signed(self.identity, self.signature, digest) else f"{self.identity.hex()} did not sign it"


def certificate_digest(receipt_key: bytes, not_before: UnixTime, not_after: UnixTime) -> bytes:
    """Return what the identity key signs: the tagged hash of the key's 33 bytes and two times of 8 bytes, big endian."""
    times = not_before.to_bytes(_TIME_BYTES, "big") + not_after.to_bytes(_TIME_BYTES, "big")
    return tagged_hash(TAG, receipt_key + times)


def tagged_hash(tag: str, message: bytes) -> bytes:
    """BIP340: SHA256(SHA256(tag) ‖ SHA256(tag) ‖ message)."""
    prefix = sha256(tag.encode()).digest()
    return sha256(prefix + prefix + message).digest()


def is_signed(public_key: bytes, signature: bytes, digest: bytes) -> bool:
    """Whether this is the key's ECDSA signature of the digest, in strict DER with low S. The key is a valid point."""
    try:
        return PublicKey(public_key).verify(signature, digest, hasher=None)
    except ValueError:
        return False
