"""The chain's contract: our own trusted view of funding outputs, time and settlements.

No backend parses a block: the node is asked. One suite, `tests/contract/test_chain.py`, holds every real backend to it.
Every method may raise `ChainFailed`, after which nothing is known and the same question may be asked again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from msgspec import Struct

from paychan.protocol.fees import ChainFees
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime


class ChainFailed(Exception):
    """The chain could not be asked, or its answer can't be trusted."""


class ChainUnfit(ChainFailed):
    """The node can't serve us as it is: wrong network, not synced, wrong credentials. The text says how to mend it."""


class WrongNetwork(ChainUnfit):
    """The node is one of another network: the configuration is wrong, and time mends nothing."""


class ChainRefused(ChainFailed):
    """The node answered, but not with what was asked for. What is optional is done without then."""


class Capabilities(Struct, frozen=True):
    """What the node behind a backend can do, read when it was connected to, and again after each interruption.

    This is the one place that decides: what is not known is None or 0, and code that needs it goes the way that works
    on every node.
    """

    software: str = ""
    version: int = 0
    full_rbf: bool | None = None
    """Replaces transactions that do not signal replaceability (BIP125)."""
    truc: bool | None = None
    """Relays version 3 transactions as TRUC (BIP431)."""
    relays: bool = True
    """Takes part in relaying transactions; false with -blocksonly."""
    pruned_below: int = 0
    """Height of the first block that is there in full."""
    mempool_bytes: int = 0
    """Most that its mempool may use."""
    news: bool = False
    """Tells of blocks by itself."""
    memory: int = 0
    """Changes when the chain has forgotten what was watched: watch everything again."""
    shortcomings: tuple[str, ...] = ()
    """What is missing, in words for the operator; the server does without."""


_COINBASE_MATURITY = 100
"""Bitcoin Core, consensus/consensus.h."""


class Funding(Struct, frozen=True):
    """An unspent output that pays to a channel's script: value in satoshi, 0 confirmations while in the mempool."""

    outpoint: OutPoint
    value_sat: Sat
    confirmations: int
    coinbase: bool = False

    @property
    def usable_confirmations(self) -> int:
        """Depth that counts: a coinbase output can't be spent before it is mature."""
        return self.confirmations if not self.coinbase or self.confirmations >= _COINBASE_MATURITY else 0


class Tip(Struct, frozen=True):
    """The newest block: height, displayed hash, its own time, and median time past (BIP113), in Unix seconds."""

    height: int
    block_hash: str
    time: UnixTime
    median_time: UnixTime


class Spend(Struct, frozen=True):
    """The transaction (internal txid) that spends an outpoint; 0 confirmations while in the mempool."""

    txid: bytes
    confirmations: int


class Payee(Protocol):
    """Who is paid to: a channel (`ChannelTerms`) or our reserve (`Reserve`)."""

    @property
    def funding_script(self) -> bytes:
        """ScriptPubKey of the outputs that are meant."""

    def funding_address(self, network: Network) -> str:
        """Its address."""


class Chain(Protocol):
    """Methods are called on the event loop and must not block it.

    A backend mends its own connection: `tip` checks a node that was away as `check` does before it is believed again.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the node can do, as far as it is known."""

    async def check(self) -> None:
        """Make sure that the node is fit to serve us.

        Raises:
            ChainUnfit: what is wrong, and the mend.
        """

    async def tip(self) -> Tip:
        """Return the newest block."""

    async def wait_for_change(self, seen: Tip, timeout_seconds: float) -> None:
        """Return when the tip is another than `seen` or something else may have changed, at the latest by the time-out."""

    async def watch(self, payees: Collection[Payee], since: UnixTime | None = None) -> None:
        """Follow what pays to these scripts and what spends from there, from now on, or since a time. Idempotent.

        Forgotten at our end, except by backends that say otherwise: every start watches the unfinished channels again.
        `since` costs something only where what was followed before has been lost.
        """

    def expect(self, payee: Payee) -> None:
        """A script was given out, and may be paid. Leaves nothing behind: no word to the node, bounded memory here."""

    async def adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:
        """Watch a script for good, with these outputs, which `funding` listed: a channel is about to be opened on them.

        Raises:
            ChainFailed: what would become of them could not be noticed; or they are there no more.
        """

    async def funding(self, payee: Payee, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List the unspent outputs that pay exactly to this script, newest view including mempool; or the one `at`.

        An output that a transaction in the mempool spends is not listed. One without a confirmation may be missing from
        the list of a script that was not expected before it was paid. Leaves nothing behind.
        """

    async def deposits(self, payees: Collection[Payee]) -> list[tuple[Payee, Funding]]:
        """List all unspent outputs that pay to these watched scripts, whatever they are there for, in any order."""

    async def unspent(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Funding]:
        """Return those of these watched outpoints that are unspent, in the chain and in the mempool."""

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        """Return what spends a watched outpoint, in the chain or else in the mempool; None while it is unspent."""

    async def transaction(self, txid: bytes) -> bytes:
        """Return, serialized, a transaction (internal txid) of an adopted output, or one that `spender` just named."""

    async def funding_transaction(self, outpoint: OutPoint) -> bytes:
        """Return, serialized, the transaction of an output that `funding` just listed. Leaves nothing behind."""

    async def holds(self, seen: Tip) -> bool:
        """Say whether this block, once the tip, is in the chain still; False after a reorg that replaced it."""

    async def fees(self) -> ChainFees:
        """Return an estimate for confirmation within hours, if there is one, and the least that is relayed now."""

    async def replacement_cost(self, txid: bytes) -> Sat | None:
        """Return the fees (satoshi) of a transaction in the mempool (internal txid) and of all that descends from it.

        A replacement must pay more than that (BIP125 rule 3). None: not in the mempool, or this chain can't tell.
        """

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        """Hand a signed transaction to the network. Idempotent: one already known or confirmed is a success.

        A `child` that spends from it goes with it, and may pay for both (package relay where the chain has it).

        Raises:
            ChainFailed: refused, with the node's reason. Of two, one may be out nevertheless.
        """

    async def close(self) -> None:
        """Let go of connections."""
