"""Basic values of all modules: amounts, times, networks and outpoints."""

from __future__ import annotations

import re
from enum import Enum
from typing import NewType

from msgspec import Struct

from paychan.protocol.errors import Malformed

Sat = NewType("Sat", int)
"""An amount in satoshi. Money is never a float."""

UnixTime = NewType("UnixTime", int)
"""Seconds since 1970-01-01 UTC."""

MAX_MONEY_SAT = Sat(21_000_000 * 100_000_000)
"""Consensus limit of any output value (Bitcoin Core, consensus/amount.h)."""

_TXID = re.compile(r"[0-9a-f]{64}")


class Network(Enum):
    """A Bitcoin network, with the version bytes and the prefix of its addresses.

    TEST is any public test network (testnet3, testnet4, signet): their addresses are the same.
    """

    LIVE = "live"
    TEST = "test"
    REGTEST = "regtest"

    @property
    def p2pkh_version(self) -> int:
        return 0x00 if self is Network.LIVE else 0x6F

    @property
    def p2sh_version(self) -> int:
        return 0x05 if self is Network.LIVE else 0xC4

    @property
    def bech32_prefix(self) -> str:
        """Human-readable part of its witness addresses (BIP173; bcrt is Bitcoin Core's)."""
        return {Network.LIVE: "bc", Network.TEST: "tb", Network.REGTEST: "bcrt"}[self]

    @property
    def wif_version(self) -> int:
        return 0x80 if self is Network.LIVE else 0xEF


class OutPoint(Struct, frozen=True, array_like=True, cache_hash=True):
    """A transaction output: its transaction's hash in internal byte order, and its index.

    Only this class converts between a displayed txid (reversed, big-endian) and internal bytes.
    """

    txid: bytes
    vout: int

    @classmethod
    def parse(cls, txid_hex: str, vout: int) -> OutPoint:
        """Read a displayed txid.

        Raises:
            Malformed: not 64 lower-case hex digits, or an index outside 32 bits.
        """
        if not _TXID.fullmatch(txid_hex):
            raise Malformed(field="funding_txid", reason="want 64 lower-case hex digits")
        if not 0 <= vout <= 0xFFFFFFFF:
            raise Malformed(field="funding_vout", reason=f"got {vout}, want 0 to 4294967295")
        return cls(bytes.fromhex(txid_hex)[::-1], vout)

    @property
    def txid_hex(self) -> str:
        """The txid as wallets and explorers show it."""
        return self.txid[::-1].hex()

    @property
    def reversed(self) -> OutPoint:
        """The outpoint of a client that wrote the txid in internal order (RBPCP §6.2)."""
        return OutPoint(self.txid[::-1], self.vout)

    def serialize(self) -> bytes:
        """36 bytes as in a transaction input: internal txid, index little endian."""
        return self.txid + self.vout.to_bytes(4, "little")

    def __str__(self) -> str:
        return f"{self.txid_hex}:{self.vout}"
