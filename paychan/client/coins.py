"""Outputs at a channel's address, and the source of each value.

A P2SH signature does not commit to the value of the output that it spends (only BIP143 does). If a refund is signed for
less than the output holds, the miners get the difference; if a payment is, the server gets it. So each value is stored
with its source. A txid commits to the outputs, so the bytes of the funding transaction prove the value without a node.
"""

from __future__ import annotations

from enum import Enum

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from msgspec import Struct

from paychan.protocol.errors import Malformed
from paychan.protocol.types import OutPoint, Sat

MOST_DEPOSITS = 100
"""Outputs at one address that are recorded beside the funding.

The limit keeps dust payments from filling the wallet.
"""


class Source(Enum):
    """Source of an output's value. Stored by value: never rename."""

    UNKNOWN = ""  # recorded by a version that kept no sources: the server's claim, or typed
    SERVER = "server"
    TYPED = "typed"
    TRANSACTION = "transaction"  # read from the transaction whose id the outpoint names
    CHAIN = "chain"  # shown by the payer's own node or Electrum server
    DEBUG = "debug"  # follows from key and expiry; no bitcoin is involved

    @property
    def checked(self) -> bool:
        """Say whether the value is proven."""
        return self in (Source.TRANSACTION, Source.CHAIN, Source.DEBUG)

    @property
    def words(self) -> str:
        """Describe the source in a few words."""
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
    """An output at a channel's address: `txid:vout`, value in satoshi, and the source of the value."""

    outpoint: str
    value_sat: Sat
    source: Source


def parse_outpoint(text: str) -> OutPoint:
    """Parse `txid:vout` as wallets show it.

    Raises:
        Malformed: not of this form.
    """
    txid, _, vout = text.partition(":")
    if not (vout.isascii() and vout.isdigit() and len(vout) <= 10):
        raise Malformed(field="outpoint", reason="want TXID:VOUT")
    return OutPoint.parse(txid, int(vout))


def proven_value(transaction: str, outpoint: OutPoint, script: bytes) -> Sat:
    """Return the value in satoshi that a transaction (hex) pays to `script` in its output `outpoint`.

    Raises:
        Malformed: not a transaction, another txid, no such output, or an output with another script.
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
    """Return the txid of a transaction (hex), as wallets show it.

    Raises:
        Malformed: not a transaction.
    """
    return str(_read(transaction).GetTxid()[::-1].hex())


def _read(transaction: str) -> CTransaction:
    try:
        return CTransaction.deserialize(bytes.fromhex(transaction))
    except (SerializationError, ValueError) as error:
        raise Malformed(field="transaction", reason=str(error)[:100] or "not a transaction") from None
