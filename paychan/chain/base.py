"""The chain's contract: the server's own, trusted view of funding outputs, time and settlements.

No backend parses blocks: it asks its node. One test suite, `tests/contract/test_chain.py`, checks every real backend.
Each method may raise `ChainFailed`; the result is then unknown, and the caller may ask again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from paychan.protocol.types import Network, OutPoint, Sat, UnixTime

if TYPE_CHECKING:
    from paychan.protocol.fees import ChainFees


class ChainFailed(Exception):
    """The chain could not be read, or its answer can't be trusted."""


class ChainUnfit(ChainFailed):
    """The node is not usable: wrong network, not synced, or wrong credentials. The message names the remedy."""


class WrongNetwork(ChainUnfit):
    """The node belongs to another network: the configuration is wrong, and waiting does not help."""


class ChainRefused(ChainFailed):
    """The node answered with an error or in another form. A caller continues without an optional answer."""


class Capabilities(Struct, frozen=True):
    """The abilities of the node behind a backend, read at each connection.

    Only this object decides which abilities are used. An unknown ability is None or 0; code that needs it then uses a
    method that works on every node.
    """

    software: str = ""
    version: int = 0
    full_rbf: bool | None = None
    """Whether the node replaces transactions that do not signal replaceability (BIP125)."""
    truc: bool | None = None
    """Whether the node relays version 3 transactions as TRUC (BIP431)."""
    relays: bool = True
    """Whether the node relays transactions; false with -blocksonly."""
    pruned_below: int = 0
    """Height of the first block that is complete."""
    mempool_bytes: int = 0
    """Largest memory that the node's mempool may use."""
    news: bool = False
    """Whether the node announces blocks by itself."""
    memory: int = 0
    """Changes when the backend has forgotten the watched scripts: the caller must watch them again."""
    shortcomings: tuple[str, ...] = ()
    """Missing abilities, in words for the operator; the server works without them."""


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
        """Confirmations, but 0 for an immature coinbase output, which can't be spent."""
        return self.confirmations if not self.coinbase or self.confirmations >= _COINBASE_MATURITY else 0


class Tip(Struct, frozen=True):
    """The newest block: height, displayed hash, its own time, and median time past (BIP113), in Unix seconds."""

    height: int
    block_hash: str
    time: UnixTime
    median_time: UnixTime

    @property
    def now(self) -> UnixTime:
        """The time by which the chain judges a lock time."""
        return self.median_time


class Spend(Struct, frozen=True):
    """The transaction (internal txid) that spends an outpoint; 0 confirmations while in the mempool."""

    txid: bytes
    confirmations: int


class Payee(Protocol):
    """The receiver of an output: a channel (`ChannelTerms`) or the server's reserve (`Reserve`)."""

    @property
    def funding_script(self) -> bytes:
        """ScriptPubKey of the outputs."""

    def funding_address(self, network: Network) -> str:
        """The address of that script."""


class Chain(Protocol):
    """Methods are called on the event loop and must not block it.

    A backend restores its own connection: after a node was away, `tip` repeats the checks of `check` before it answers.
    """

    @property
    def capabilities(self) -> Capabilities:
        """The known abilities of the node."""

    async def check(self) -> None:
        """Check that the node is usable.

        Raises:
            ChainUnfit: the message names the problem and its remedy.
        """

    async def tip(self) -> Tip:
        """Return the newest block."""

    async def wait_for_change(self, seen: Tip, timeout_seconds: float) -> None:
        """Return when the tip differs from `seen` or another change is possible; at the latest after the time-out."""

    async def watch(self, payees: Collection[Payee], since: UnixTime | None = None) -> None:
        """Follow payments to these scripts and spends of them, from now on or from a time. Idempotent.

        A backend forgets them at its end, unless it says otherwise: after each start, unfinished channels are watched
        again. `since` costs time only if earlier watches were lost.
        """

    def expect(self, payee: Payee) -> None:
        """Note that a payer has received this script and may pay to it.

        Sends nothing to the node; uses bounded memory.
        """

    async def adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:
        """Watch a script permanently, with these outputs, which `funding` listed: a channel is about to open on them.

        Raises:
            ChainFailed: their spending could not be noticed, or they no longer exist.
        """

    async def funding(self, payee: Payee, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List the unspent outputs that pay exactly to this script, including the mempool; or only the one `at`.

        An output that a transaction in the mempool spends is not listed. An unconfirmed output may be missing if
        `expect` was not called before the payment. Leaves no state in the node.
        """

    async def deposits(self, payees: Collection[Payee]) -> list[tuple[Payee, Funding]]:
        """List all unspent outputs that pay to these watched scripts, for any purpose and in any order."""

    async def unspent(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Funding]:
        """Return those of these watched outpoints that are unspent, in the chain and in the mempool."""

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        """Return the transaction that spends a watched outpoint, in the chain or else in the mempool; None if unspent."""

    async def transaction(self, txid: bytes) -> bytes:
        """Return, serialized, a transaction (internal txid) of an adopted output, or one that `spender` has just named."""

    async def funding_transaction(self, outpoint: OutPoint) -> bytes:
        """Return, serialized, the transaction of an output that `funding` has just listed.

        Leaves no state in the node.
        """

    async def holds(self, seen: Tip) -> bool:
        """Return whether this block, once the tip, is still in the chain; False after a reorg that replaced it."""

    async def fees(self) -> ChainFees:
        """Return an estimate for confirmation within hours, if there is one, and the lowest rate that is relayed now."""

    async def replacement_cost(self, txid: bytes) -> Sat | None:
        """Return the fees (satoshi) of a transaction in the mempool (internal txid) and of all its descendants.

        A replacement must pay more (BIP125 rule 3). None: the transaction is not in the mempool, or the backend can't
        tell.
        """

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        """Broadcast a signed transaction. Idempotent: one that is already known or confirmed is a success.

        A `child` that spends from it is broadcast with it and may pay for both (package relay where the backend has
        it).

        Raises:
            ChainFailed: refused, with the node's reason. With a child, one of the two may be broadcast nevertheless.
        """

    async def close(self) -> None:
        """Close the connections."""


class PayerChain(Chain, Protocol):
    """The chain as a payer's own node or Electrum server shows it: all outputs at the payer's own scripts."""

    spends_need_rescan: bool
    """Whether `watch` must read old blocks (`since`) before `spender` knows the spends of a script that was not watched."""

    async def find_all(self, payee: Payee) -> tuple[Funding, ...]:
        """List all unspent outputs that pay to this script, and follow it permanently."""
