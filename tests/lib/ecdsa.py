"""Textbook ECDSA on secp256k1, for signatures that libsecp256k1 would not make: chosen nonces, chosen or high S."""

from __future__ import annotations

from coincurve import PrivateKey

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""Order of the group that secp256k1's points form."""


def der(r: int, s: int) -> bytes:
    """Encode two positive integers in DER, each in its shortest form."""
    numbers = [number.to_bytes(number.bit_length() // 8 + 1, "big") for number in (r, s)]
    body = b"".join(bytes([2, len(number)]) + number for number in numbers)
    return bytes([0x30, len(body)]) + body


def high_s_twin(signature: bytes) -> bytes:
    """Replace S by the group's order less S; the signature stays valid."""
    r_size = signature[3]
    r, s = signature[4 : 4 + r_size], signature[6 + r_size :]
    return der(int.from_bytes(r, "big"), ORDER - int.from_bytes(s, "big"))


def sign_with_nonce(key: PrivateKey, digest: bytes, nonce: int) -> bytes:
    """Sign a digest (32 bytes) with low S and the given nonce."""
    r = _x_of(nonce)
    s = pow(nonce, -1, ORDER) * (int.from_bytes(digest, "big") + r * key.to_int()) % ORDER
    return der(r, min(s, ORDER - s))


def digest_for(key: PrivateKey, nonce: int, s: int) -> tuple[bytes, bytes]:
    """Return a digest and the key's valid signature of it with this S: the digest is solved for, `z = s k - r d`."""
    r = _x_of(nonce)
    return ((s * nonce - r * key.to_int()) % ORDER).to_bytes(32, "big"), der(r, s)


def _x_of(nonce: int) -> int:
    return int.from_bytes(PrivateKey.from_int(nonce).public_key.format()[1:], "big") % ORDER
