"""Outputs at a channel's address, and how their values are known.

A P2SH signature does not commit to the value of what it spends (only BIP143 does): a refund that is signed for less than
an output holds gives the difference to the miners, and a payment gives it to the server. So each value carries its source.
A transaction's id commits to its outputs: with the funding transaction's bytes the value is checked without a node.
"""

from __future__ import annotations

from enum import Enum

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from msgspec import Struct

from paychan.protocol.errors import Malformed
from paychan.protocol.types import OutPoint, Sat

MOST_DEPOSITS = 100
"""Outputs at one address that are remembered beside the funding; dust sent there must not fill the wallet."""


class Source(Enum):
    """How the value of an output is known. Stored by value: never rename."""

    UNKNOWN = ""  # noted before sources were kept: the server's word, or typed
    SERVER = "server"
    TYPED = "typed"
    TRANSACTION = "transaction"  # read from the transaction whose id the outpoint names
    CHAIN = "chain"  # shown by a node or Electrum server of the payer's
    DEBUG = "debug"  # follows from key and expiry; no bitcoin is involved

    @property
    def checked(self) -> bool:
        """Say whether the value is certain."""
        return self in (Source.TRANSACTION, Source.CHAIN, Source.DEBUG)

    @property
    def words(self) -> str:
        """The source in a few words."""
        return _WORDS[self]


_WORDS = {
    Source.UNKNOWN: "the server's word or typed, not checked",
    Source.SERVER: "the server's word, not checked",
    Source.TYPED: "typed, not checked",
    Source.TRANSACTION: "checked with the funding transaction",
    Source.CHAIN: "shown by your own chain",
    Source.DEBUG: "debug funding, no bitcoin",
}


class Deposit(Struct, frozen=True, forbid_unknown_fields=True):
    """An output at a channel's address: `txid:vout`, its value in satoshi, and how that is known."""

    outpoint: str
    value_sat: Sat
    source: Source


def parse_outpoint(text: str) -> OutPoint:
    """Read `txid:vout` as wallets show it.

    Raises:
        Malformed: anything else.
    """
    txid, _, vout = text.partition(":")
    if not (vout.isascii() and vout.isdigit() and len(vout) <= 10):
        raise Malformed(field="outpoint", reason="want TXID:VOUT")
    return OutPoint.parse(txid, int(vout))


def proven_value(transaction: str, outpoint: OutPoint, script: bytes) -> Sat:
    """Read from a transaction (hex) what its output at `outpoint` pays to `script`.

    Raises:
        Malformed: not a transaction, one with another id, or one that does not pay there.
    """
    parsed = _read(transaction)
    if bytes(parsed.GetTxid()) != outpoint.txid:
        reason = f"its id is {parsed.GetTxid()[::-1].hex()}, want {outpoint.txid_hex}"
        raise Malformed(field="transaction", reason=reason)
    if outpoint.vout >= len(parsed.vout):
        raise Malformed(field="transaction", reason=f"it has {len(parsed.vout)} outputs, want number {outpoint.vout}")
    output = parsed.vout[outpoint.vout]
    if bytes(output.scriptPubKey) != script:
        raise Malformed(field="transaction", reason=f"output {outpoint.vout} does not pay to the channel's address")
    return Sat(int(output.nValue))


def txid_of(transaction: str) -> str:
    """Return the id of a transaction (hex), as wallets show it.

    Raises:
        Malformed: not a transaction.
    """
    return str(_read(transaction).GetTxid()[::-1].hex())


def _read(transaction: str) -> CTransaction:
    try:
        return CTransaction.deserialize(bytes.fromhex(transaction))
    except (SerializationError, ValueError) as error:
        raise Malformed(field="transaction", reason=str(error)[:100] or "not a transaction") from None
