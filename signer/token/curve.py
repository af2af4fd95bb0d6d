"""Conversions between a token's secp256k1 encodings and Bitcoin's. Pure functions of bytes."""

from __future__ import annotations

from coincurve import PublicKey

from paychan.protocol.keys import GROUP_ORDER

SECP256K1 = bytes.fromhex("06052b8104000a")
"""CKA_EC_PARAMS: the DER of the object identifier 1.3.132.0.10."""

_POINT_BYTES = {2: 33, 3: 33, 4: 65}
"""SEC 1, 2.3.3: length of a point by its first byte."""


def compressed_point(attribute: bytes) -> bytes:
    """Convert a CKA_EC_POINT to a compressed public key.

    PKCS#11: "DER-encoding of ANSI X9.62 ECPoint value Q", an OCTET STRING around the point; some tokens leave out the
    OCTET STRING. The length tells which form it is.

    Raises:
        ValueError: neither form, or not on the curve.
    """
    wrapped = attribute[:2] == bytes([4, len(attribute) - 2 & 0xFF]) and len(attribute) in (35, 67)
    point = attribute[2:] if wrapped else attribute
    if not point or len(point) != _POINT_BYTES.get(point[0]):
        msg = f"{len(attribute)} bytes are no point of secp256k1"
        raise ValueError(msg)
    return PublicKey(point).format()


def der_signature(raw: bytes) -> bytes:
    """Convert the output of CKM_ECDSA, r and s of 32 bytes each, to strict DER with low S.

    BIP62 rule 5: "We require that the S value inside ECDSA signatures is at most the curve order divided by 2". Half of
    a token's signatures have a high S.

    Raises:
        ValueError: not two numbers between 1 and the order.
    """
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    if len(raw) != 64 or not (0 < r < GROUP_ORDER and 0 < s < GROUP_ORDER):
        msg = f"{len(raw)} bytes are no signature of secp256k1"
        raise ValueError(msg)
    body = _der_integer(r) + _der_integer(min(s, GROUP_ORDER - s))
    return bytes([0x30, len(body)]) + body


def der_numbers(signature: bytes) -> tuple[int, int]:
    """Read r and s of a signature that `der_signature` made."""
    size = signature[3]
    return int.from_bytes(signature[4 : 4 + size], "big"), int.from_bytes(signature[6 + size :], "big")


def _der_integer(number: int) -> bytes:
    """BIP66: the shortest encoding, with a leading zero where the number would otherwise be negative."""
    content = number.to_bytes(number.bit_length() // 8 + 1, "big")
    return bytes([0x02, len(content)]) + content
