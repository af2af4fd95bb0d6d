"""Bech32 and Bech32m, the text forms of witness programs (BIP173, BIP350).

Written here, because scripts are the core of this project: the code is short, and the vectors of both BIPs test it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_CHARACTERS = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_VALUES = {character: value for value, character in enumerate(_CHARACTERS)}
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM_CHARACTERS = 6

MAX_CHARACTERS = 90
"""Most characters of a text; the checksum guarantees less for a longer one."""

BECH32 = 1
"""The checksum's constant for witness version 0 (BIP173)."""

BECH32M = 0x2BC830A3
"""The checksum's constant for witness versions 1 to 16 (BIP350)."""


class Bech32Error(ValueError):
    """The text breaks a rule of BIP173 or BIP350; the message names the rule."""


class Decoded(NamedTuple):
    """A text with a valid checksum: its prefix in lower case, its data in groups of 5 bits, its checksum's constant."""

    prefix: str
    values: tuple[int, ...]
    constant: int


class WitnessProgram(NamedTuple):
    """A witness version, 0 to 16, and a program of 2 to 40 bytes (BIP141)."""

    version: int
    program: bytes


def decode(text: str) -> Decoded:
    """Read a text of either form.

    Raises:
        Bech32Error: too long, mixed case, a character outside the alphabet, no prefix, or a wrong checksum.
    """
    if len(text) > MAX_CHARACTERS:
        msg = f"longer than {MAX_CHARACTERS} characters"
        raise Bech32Error(msg)
    if not all("!" <= character <= "~" for character in text):
        msg = "a character that is not printable ASCII"
        raise Bech32Error(msg)
    lower = text.lower()
    if text not in (lower, text.upper()):
        msg = "upper and lower case mixed"
        raise Bech32Error(msg)
    prefix, _, data = lower.rpartition("1")
    if not prefix or len(data) < _CHECKSUM_CHARACTERS:
        msg = "no prefix, or fewer than 6 characters after the last 1"
        raise Bech32Error(msg)
    values = [_VALUES.get(character, -1) for character in data]
    if min(values) < 0:
        msg = "a character outside the alphabet of bech32"
        raise Bech32Error(msg)
    constant = _checksum(prefix, values)
    if constant not in (BECH32, BECH32M):
        msg = "wrong checksum"
        raise Bech32Error(msg)
    return Decoded(prefix, tuple(values[:-_CHECKSUM_CHARACTERS]), constant)


def encode(prefix: str, values: Sequence[int], constant: int) -> str:
    """Write groups of 5 bits in lower case."""
    rest = _checksum(prefix, [*values, *bytes(_CHECKSUM_CHARACTERS)]) ^ constant
    checksum = [rest >> 5 * place & 31 for place in reversed(range(_CHECKSUM_CHARACTERS))]
    return prefix + "1" + "".join(_CHARACTERS[value] for value in (*values, *checksum))


def witness_program(decoded: Decoded) -> WitnessProgram:
    """Read the witness program of an address.

    Raises:
        Bech32Error: no version of 0 to 16, padding that is not 0 to 4 zero bits, a length that BIP141 does not allow, or
            the checksum of the other form.
    """
    if not decoded.values:
        msg = "no data"
        raise Bech32Error(msg)
    version, *groups = decoded.values
    if version > 16:
        msg = f"witness version {version}, want 0 to 16"
        raise Bech32Error(msg)
    program = _bytes_of(groups)
    if not 2 <= len(program) <= 40 or (version == 0 and len(program) not in (20, 32)):
        msg = f"witness program of {len(program)} bytes for version {version}"
        raise Bech32Error(msg)
    if decoded.constant != _constant(version):
        msg = "checksum of Bech32m for version 0" if version == 0 else f"checksum of Bech32 for version {version}"
        raise Bech32Error(msg)
    return WitnessProgram(version, program)


def encode_program(prefix: str, version: int, program: bytes) -> str:
    """Write the address of a witness program, in lower case."""
    bits = len(program) * 8
    padding = -bits % 5
    number = int.from_bytes(program, "big") << padding
    groups = [number >> at & 31 for at in range(bits + padding - 5, -1, -5)]
    return encode(prefix, [version, *groups], _constant(version))


def _constant(version: int) -> int:
    return BECH32M if version else BECH32


def _bytes_of(groups: Sequence[int]) -> bytes:
    padding = len(groups) * 5 % 8
    number = 0
    for group in groups:
        number = number << 5 | group
    if padding > 4 or number & ((1 << padding) - 1):
        msg = "padding of more than 4 bits, or not of zeros"
        raise Bech32Error(msg)
    return (number >> padding).to_bytes(len(groups) * 5 // 8, "big")


def _checksum(prefix: str, values: Sequence[int]) -> int:
    """Remainder of prefix and values by the code's generator polynomial (BIP173, Checksum)."""
    codes = prefix.encode("ascii")
    remainder = 1
    for value in (*(code >> 5 for code in codes), 0, *(code & 31 for code in codes), *values):
        top = remainder >> 25
        remainder = (remainder & 0x1FFFFFF) << 5 ^ value
        for place, term in enumerate(_GENERATOR):
            remainder ^= term if top >> place & 1 else 0
    return remainder
