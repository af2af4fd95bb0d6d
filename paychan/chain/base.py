"""The chain's contract: our own trusted view of funding outputs, time and settlements.

No method parses a block: the node is asked. Every method may raise `ChainFailed`, after which nothing is known.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from paychan.protocol.scripts import ChannelTerms
from paychan.protocol.types import OutPoint, Sat, UnixTime


class ChainFailed(Exception):
    """The chain could not be asked, or its answer can't be trusted."""


class Funding(Struct, frozen=True):
    """An unspent output that pays to a channel's script: value in satoshi, 0 confirmations while in the mempool."""

    outpoint: OutPoint
    value_sat: Sat
    confirmations: int


class Tip(Struct, frozen=True):
    """The newest block: height, displayed hash, median time past in Unix seconds (BIP113)."""

    height: int
    block_hash: str
    median_time: UnixTime


class Spend(Struct, frozen=True):
    """The transaction (internal txid) that spends an outpoint; 0 confirmations while in the mempool."""

    txid: bytes
    confirmations: int


class Chain(Protocol):
    """Methods are called on the event loop and must not block it."""

    async def funding(self, terms: ChannelTerms) -> tuple[Funding, ...]:
        """List the unspent outputs that pay exactly to the script of these terms, newest view including mempool."""

    async def tip(self) -> Tip:
        """Return the newest block."""

    async def fee_rate(self) -> int | None:
        """Estimate satoshi per virtual byte for confirmation within hours; None when there is no estimate."""

    async def publish(self, transaction: bytes) -> None:
        """Hand a signed transaction to the network. Idempotent: one already known or confirmed is a success."""

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        """Return what spends an outpoint, or None while it is unspent."""

    async def close(self) -> None:
        """Let go of connections."""
