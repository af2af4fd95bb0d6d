"""Payments: a change value and the client's signature over it; their checks, their signing, their v1 encoding."""

from __future__ import annotations

import base64
import binascii
import re
from hashlib import sha256
from typing import Annotated

from coincurve import PrivateKey
from msgspec import Meta, Struct

from paychan.protocol.errors import (
    BadFlag,
    BadSignature,
    DustChange,
    FlagMismatch,
    Malformed,
    PaychanError,
    SignatureEncoding,
)
from paychan.protocol.keys import parsed_key
from paychan.protocol.kinds.base import ChannelKind, ChannelTerms
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat

_HALF_ORDER = bytes.fromhex("7fffffffffffffffffffffffffffffff5d576e7357a4501ddfe92f46681b20a0")
"""Half the order of secp256k1's group: the largest S that Bitcoin nodes relay (BIP62 rule 5)."""

_USUAL_ENCODING = re.compile(
    rb"(?s:\x30\x44\x02\x20[\x01-\x7f].{31}|\x30\x45\x02\x21\x00[\x80-\xff].{31})\x02\x20([\x01-\x7f](?s:.{31}))"
)
"""Form of nearly all signatures: two integers of 32 bytes, the first after a zero byte if its top bit is set."""

_ONE_ALPHABET = bytes.maketrans(b"-_ ", b"+/+")

_MIN_PAYLOAD_BYTES = 17
_MAX_PAYLOAD_BYTES = 8 + 72 + 1

SignatureBytes = Annotated[bytes, Meta(min_length=8, max_length=72)]


class Payment(Struct, frozen=True, array_like=True):
    """A payment as received: the value in satoshi that still belongs to the client, a DER signature, the hash flag."""

    change_sat: Sat
    signature: SignatureBytes
    flag: int

    @property
    def signature_with_flag(self) -> bytes:
        """Bytes that a scriptSig pushes."""
        return self.signature + bytes([self.flag])

    @property
    def proof(self) -> str:
        """SHA-256 of the signature, as hex: shows the client that it signed this payment, and gives no other caller it.

        RFC 6979 gives the client the same signature again, so a client that kept only older payments can compare.
        """
        return sha256(self.signature).hexdigest()

    @property
    def has_change(self) -> bool:
        """Whether the settlement must pay the client; `change_problem` checks that the flag says the same."""
        return self.change_sat > 0


class PaymentVerifier:
    """Checks the payments of one channel; it parses the key and lays out the digest's fixed parts once."""

    __slots__ = ("_change_flag", "_drained_flag", "_preimage", "_verify", "kind")

    def __init__(self, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, change_script: bytes) -> None:
        self.kind = kind = terms.kind
        self._change_flag, self._drained_flag = kind.change_flag, kind.drained_flag
        self._preimage = kind.payment_preimage(terms, outpoint, funding_sat, change_script)
        self._verify = parsed_key(terms.client_key).verify

    def problem(self, payment: Payment, dust_sat: Sat = Sat(0)) -> PaychanError | None:
        """Return why a payment is not valid, or None: flag and change value, encoding, then the client's signature.

        Change below `dust_sat` satoshi is refused, because the network would not relay its output.
        """
        change_sat, signature = payment.change_sat, payment.signature
        flag = self._change_flag if change_sat else self._drained_flag
        if payment.flag != flag or 0 < change_sat < dust_sat:
            return change_problem(payment, self.kind, dust_sat)
        usual = _USUAL_ENCODING.fullmatch(signature)
        if (usual is None or usual[1] > _HALF_ORDER) and (reason := encoding_problem(signature)) is not None:
            return SignatureEncoding(reason=reason)
        preimage = self._preimage
        if change_sat and not preimage.hashes_output:  # `preimage.digest`, without its calls
            raw = preimage.head + change_sat.to_bytes(8, "little") + preimage.script + preimage.tail
            digest = sha256(sha256(raw).digest()).digest()
        else:
            digest = preimage.digest(change_sat)
        if not self._verify(signature, digest, hasher=None):
            return BadSignature(change_sat=change_sat)
        return None


def change_problem(payment: Payment, kind: ChannelKind, dust_sat: Sat) -> PaychanError | None:
    """Return why flag and change value contradict each other or the dust limit, or None (RBPCP §3).

    The flag must fit, because it becomes part of a settlement; the digest follows from the change value alone.
    """
    change_sat = payment.change_sat
    if payment.flag == (kind.change_flag if change_sat else kind.drained_flag):
        return DustChange(got_sat=change_sat, need_sat=dust_sat) if 0 < change_sat < dust_sat else None
    if payment.flag in (kind.change_flag, kind.drained_flag):
        return FlagMismatch(flag=payment.flag, change_sat=change_sat)
    return BadFlag(got=payment.flag)


def encoding_problem(signature: bytes) -> str | None:
    """Return how a signature (without flag) departs from strict DER with low S, or None.

    BIP66: "0x30 [total-length] 0x02 [R-length] [R] 0x02 [S-length] [S]", minimal, not negative.
    """
    usual = _USUAL_ENCODING.fullmatch(signature)
    if usual is not None and usual[1] <= _HALF_ORDER:
        return None
    size = len(signature)
    if not 8 <= size <= 72 or signature[0] != 0x30 or signature[1] != size - 2 or signature[2] != 0x02:
        return "not a DER sequence of two integers"
    r_size = signature[3]
    if 5 + r_size >= size or signature[4 + r_size] != 0x02 or r_size + signature[5 + r_size] + 6 != size:
        return "lengths do not add up"
    r, s = signature[4 : 4 + r_size], signature[6 + r_size :]
    for number in (r, s):
        if not number or number[0] & 0x80:
            return "negative or empty integer"
        if len(number) > 1 and number[0] == 0 and not number[1] & 0x80:
            return "padded integer"
    if len(r) > 33:
        return "R is longer than 256 bits"
    if len(s) > 32 or (len(s) == 32 and s > _HALF_ORDER):
        return "S is in the upper half"
    return None


class PaymentSigner:
    """Makes the payments of one channel; it builds the sighash prefix once."""

    __slots__ = ("_key", "_preimage", "kind")

    def __init__(
        self, key: PrivateKey, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, change_script: bytes
    ) -> None:
        self._key, self.kind = key, terms.kind
        self._preimage = self.kind.payment_preimage(terms, outpoint, funding_sat, change_script)

    def payment(self, change_sat: Sat) -> Payment:
        """Sign the payment that leaves `change_sat` to the client (RFC 6979: the same input gives the same bytes)."""
        signature = self._key.sign(self._preimage.digest(change_sat), hasher=None)
        return Payment(change_sat, signature, self.kind.flag(change_sat))


def sign_payment(
    key: PrivateKey, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, change_script: bytes, change_sat: Sat
) -> Payment:
    """Make one payment; see `PaymentSigner`."""
    return PaymentSigner(key, terms, outpoint, funding_sat, change_script).payment(change_sat)


def encode_v1(payment: Payment) -> str:
    """Write the `payment` query parameter: unpadded base64url (RBPCP §4.1)."""
    raw = payment.change_sat.to_bytes(8, "little") + payment.signature_with_flag
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_v1(text: str) -> Payment:
    """Read the `payment` query parameter, padded or not, `-_` or `+/` (a `+` may arrive as a space).

    Raises:
        Malformed: other characters, wrong length, trailing bytes, or more than all bitcoins.
    """
    plain = text.rstrip("=")
    if len(text) - len(plain) > 2 or len(plain) > 4 * _MAX_PAYLOAD_BYTES // 3 + 2:
        raise Malformed(field="payment", reason=f"{len(text)} characters of base64")
    try:
        padded = plain.encode("ascii") + b"==="[: -len(plain) % 4]
        raw = binascii.a2b_base64(padded.translate(_ONE_ALPHABET), strict_mode=True)
    except ValueError:
        raise Malformed(field="payment", reason="not base64url") from None
    if len(raw) < _MIN_PAYLOAD_BYTES:
        raise Malformed(field="payment", reason=f"got {len(raw)} bytes, need at least {_MIN_PAYLOAD_BYTES}")
    if raw[8] != 0x30 or len(raw) != 8 + 2 + raw[9] + 1:
        raise Malformed(field="payment", reason="signature length does not leave exactly one byte for the flag")
    return make_payment(int.from_bytes(raw[:8], "little"), raw[8:-1], raw[-1])


def make_payment(change: int, signature: bytes, flag: int) -> Payment:
    """Combine parts as received.

    Raises:
        Malformed: a change value below zero or above all bitcoins, or a signature longer than DER can be.
    """
    if not 0 <= change <= MAX_MONEY_SAT:
        raise Malformed(field="change_value", reason=f"got {change} sat, want 0 to {MAX_MONEY_SAT} sat")
    if not 8 <= len(signature) <= 72:
        raise Malformed(field="signature_data", reason=f"got {len(signature)} bytes, want 8 to 72")
    return Payment(Sat(change), signature, flag)
