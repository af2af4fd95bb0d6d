"""The channel's redeem script: it defines who may spend the funding output, and when (RBPCP §2).

Only `ChannelTerms` knows the script; sighash, settlement and refund take their bytes from it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

from coincurve import PublicKey
from msgspec import Meta, Struct

from paychan.protocol.address import encode_address, p2sh_script
from paychan.protocol.errors import ExpiryNotATime, KeyReuse, Malformed
from paychan.protocol.types import Network, UnixTime

MIN_EXPIRY = UnixTime(500_000_000)
"""BIP65: lower lock times are block heights, which this kind of channel can't use."""

MAX_EXPIRY = UnixTime(0xFFFFFFFF)
"""nLockTime has 32 bits; a channel with a later expiry could never be refunded."""

_KEY_HEX = re.compile(r"0[23][0-9a-f]{64}")

KeyBytes = Annotated[bytes, Meta(min_length=33, max_length=33)]


class ChannelTerms(Struct, frozen=True, array_like=True):
    """Server key S, client key C (33-byte compressed points) and expiry E (Unix seconds) of one channel."""

    server_key: KeyBytes
    client_key: KeyBytes
    expiry: UnixTime

    @property
    def redeem_script(self) -> bytes:
        """80 or 81 bytes: `IF <S> CHECKSIGVERIFY ELSE <E> CLTV DROP ENDIF <C> CHECKSIG`."""
        return _redeem_script(self.server_key, self.client_key, self.expiry)

    @property
    def funding_script(self) -> bytes:
        """ScriptPubKey of the funding output (P2SH, 23 bytes)."""
        return p2sh_script(self.redeem_script)

    def funding_address(self, network: Network) -> str:
        """Base58 address that the client's wallet pays to."""
        return encode_address(self.funding_script, network)


@lru_cache(1_000)
def _redeem_script(server_key: bytes, client_key: bytes, expiry: int) -> bytes:
    """Build a redeem script; the newest are cached, because judging and signing need the script several times."""
    number = encode_script_number(expiry)
    return b"".join(
        (
            b"\x63\x21",
            server_key,
            b"\xad\x67",
            bytes([len(number)]),
            number,
            b"\xb1\x75\x68\x21",
            client_key,
            b"\xac",
        )
    )


def encode_script_number(value: int) -> bytes:
    """Shortest script number of a positive value: little endian, 0x00 appended when the top bit is set."""
    raw = value.to_bytes((value.bit_length() + 7) // 8, "little")
    return raw + b"\x00" if raw[-1] & 0x80 else raw


def check_expiry(value: int) -> UnixTime:
    """Return an expiry that is a time and fits nLockTime.

    Raises:
        ExpiryNotATime: a block height (below 500,000,000), or more than 32 bits.
    """
    if not MIN_EXPIRY <= value <= MAX_EXPIRY:
        raise ExpiryNotATime(got=value)
    return UnixTime(value)


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


def make_terms(server_key: bytes, client_key: bytes, expiry: int) -> ChannelTerms:
    """Combine checked parts into terms.

    Raises:
        ExpiryNotATime: see `check_expiry`.
        KeyReuse: both keys are the same, so one party could spend alone.
    """
    if server_key == client_key:
        raise KeyReuse(server_key=server_key.hex())
    return ChannelTerms(server_key, client_key, check_expiry(expiry))


def parse_redeem_script(script: bytes) -> ChannelTerms:
    """Read a script that has exactly this template; the script rebuilt from its parts must have the same bytes.

    Raises:
        Malformed: any other script, including one whose expiry is not minimally encoded.
        ExpiryNotATime, KeyReuse: see `make_terms`.
    """
    problem = Malformed(field="redeem_script", reason="not the payment channel template")
    if len(script) not in (80, 81) or script[37] != len(script) - 76:
        raise problem
    expiry = int.from_bytes(script[38 : 38 + script[37]], "little")
    terms = make_terms(
        check_public_key(script[2:35], "redeem_script"), check_public_key(script[-34:-1], "redeem_script"), expiry
    )
    if terms.redeem_script != script:
        raise problem
    return terms
