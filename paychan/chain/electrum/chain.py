"""A chain seen through an Electrum server (ElectrumX, electrs, Fulcrum): for operators without a full node.

Trust. What is confirmed the server can't make up, neither a payment to us nor its amount, its spending or its depth:
transactions are checked against their ids, confirmations against merkle proofs and connected headers with their work,
on the live network at a difficulty that makes forging cost more than most channels hold. It *can* keep things from us:
new blocks (the age of the tip tells), a spend or a double-spend. It can make up transactions without confirmations,
estimate any fee, and it learns which addresses are ours. So run it yourself, or ask two whom you don't think to be in
league: operator's choice.

Not followed are consensus rules other than work. Blocks are never read; of a transaction, and only of one that pays to
us or spends from there, its inputs' outpoints and its outputs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from hashlib import sha256
from pathlib import Path
from typing import Annotated, TypeVar

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from msgspec import Meta, Struct

from paychan.chain.base import Capabilities, ChainFailed, ChainUnfit, Funding, Payee, Spend, Tip
from paychan.chain.electrum.connection import ServerRefused
from paychan.chain.electrum.fees import read_fees, submit_package
from paychan.chain.electrum.headers import ElectrumHeaders, HashHex
from paychan.chain.electrum.session import ElectrumLink
from paychan.chain.spv import ViewMoved
from paychan.protocol.fees import ChainFees
from paychan.protocol.types import MAX_MONEY_SAT, Network, OutPoint, Sat, UnixTime

_MOST_OUTPUTS = 100
"""Outputs on one address that are looked at, the most valuable first: thousands of dust are not worth the requests."""

_PAUSES_SECONDS = (0.1, 0.4, 1.5)
"""A server is done with a reorg after these."""

_INDEX_LAG_SECONDS = 10
"""ElectrumX asks its node for news every five seconds."""

_NODE_ERROR = 2
"""Code of an answer that the server's own node refused; for transaction.get: it knows no such transaction."""

_T = TypeVar("_T")


class _Unspent(Struct):
    tx_hash: HashHex
    tx_pos: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
    height: int
    value: Annotated[int, Meta(ge=0, le=MAX_MONEY_SAT)]

    @property
    def outpoint(self) -> OutPoint:
        return OutPoint.parse(self.tx_hash, self.tx_pos)


class _Touching(Struct):
    """A transaction that pays to a script or spends from it; height 0 or -1 while in the mempool."""

    tx_hash: HashHex
    height: int


class _Output(Struct, frozen=True):
    script: bytes
    value_sat: Sat
    coinbase: bool


class ElectrumChain:
    """A `paychan.chain.base.Chain` over the Electrum protocol 1.4 to 1.6.

    A server that leaves one request without an answer for `timeout_seconds` has failed; a question takes up to four of
    them in a row. ElectrumX holds small answers back for up to a second, its view may lag its node's by seconds, and it
    follows a reorg once the new branch is longer. What is watched is forgotten at our end.
    """

    def __init__(
        self, url: str, network: Network, *, timeout_seconds: float, certificate_file: Path | None = None
    ) -> None:
        """Connect to nobody yet; `url` and `certificate_file` are `ElectrumLink`'s, whose errors this raises."""
        self._news = asyncio.Event()
        self._link = ElectrumLink(url, network, timeout_seconds, certificate_file, self._news.set)
        self._headers = ElectrumHeaders(self._link, network)
        self._watched: set[bytes] = set()
        self._outputs: dict[OutPoint, _Output] = {}
        self._shortcoming = ""

    @property
    def capabilities(self) -> Capabilities:
        """What is known of the node behind the server, which is little."""
        return Capabilities(news=True, shortcomings=tuple(filter(None, [self._shortcoming])))

    async def check(self) -> None:
        """Make sure that the server is there, of our network, and speaks a protocol that we know.

        Whether it is up to date nobody but the tip's time can tell.
        """
        try:
            await self.tip()
        except ChainUnfit:
            raise
        except ChainFailed as failure:
            msg = f"{failure}: is an Electrum server running there, and done with its synchronization?"
            raise ChainUnfit(msg) from None

    async def tip(self) -> Tip:
        return await self._headers.sync()

    async def wait_for_change(self, seen: Tip, timeout_seconds: float) -> None:
        """Return when the server announces anything, or the connection to it is lost or there again."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._link.wait_until_connected()
                if self._headers.tip not in (seen, None):
                    return
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()

    async def watch(self, payees: Collection[Payee], since: UnixTime | None = None) -> None:  # noqa: ARG002 - servers know all
        scripts = {each.funding_script for each in payees}
        self._watched |= scripts
        await self._link.follow(_script_hash(script) for script in scripts)

    def expect(self, payee: Payee) -> None:
        """The server knows all scripts."""

    async def adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:  # noqa: ARG002 - the server knows them
        await self.watch([payee])

    async def funding(self, payee: Payee, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List them, the most valuable first, and of those no more than a hundred."""
        return await _steadily(lambda: self._fundings(payee.funding_script, at))

    async def deposits(self, payees: Collection[Payee]) -> list[tuple[Payee, Funding]]:
        found = await asyncio.gather(*(self.funding(payee) for payee in payees))
        return [(payee, each) for payee, fundings in zip(payees, found, strict=True) for each in fundings]

    async def unspent(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Funding]:
        return await _steadily(lambda: self._still_unspent(frozenset(outpoints)))

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        """Look through the history of the outpoint's script, the newest blocks first, the mempool last."""
        return await _steadily(lambda: self._spender(outpoint))

    async def transaction(self, txid: bytes) -> bytes:
        return bytes((await self._transaction(txid)).serialize())

    async def funding_transaction(self, outpoint: OutPoint) -> bytes:
        return await self.transaction(outpoint.txid)

    async def holds(self, seen: Tip) -> bool:
        return await self._headers.holds(seen)

    async def fees(self) -> ChainFees:
        fees, self._shortcoming = await read_fees(self._link)
        return fees

    async def replacement_cost(self, txid: bytes) -> Sat | None:  # noqa: ARG002 - the protocol has no question for it
        return None

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        """Broadcast; with a child as a package, where the server takes one, else one by one.

        What the server's node refuses may be there already: then that is a success.
        """
        reasons = await submit_package(self._link, transaction, child) if child else ""
        if child and not reasons:
            return
        try:
            for each in filter(None, (transaction, child)):
                await self._broadcast(each)
        except ServerRefused as refusal:
            if not reasons:
                raise
            msg = f"{refusal}; with its child: {reasons}"
            raise ChainFailed(msg) from None

    async def close(self) -> None:
        await self._link.close()

    async def _broadcast(self, transaction: bytes) -> None:
        try:
            await self._link.ask("blockchain.transaction.broadcast", transaction.hex(), kind=str)
        except ServerRefused:
            if not await self._is_known(transaction):
                raise

    async def _fundings(self, script: bytes, at: OutPoint | None) -> tuple[Funding, ...]:
        listed, _ = await asyncio.gather(self._list_unspent(script), self._headers.sync())
        unspent = [each for each in listed if at in (None, each.outpoint)]
        unspent.sort(key=lambda each: -each.value)
        return tuple(await asyncio.gather(*(self._funding(script, each) for each in unspent[:_MOST_OUTPUTS])))

    async def _still_unspent(self, wanted: Collection[OutPoint]) -> dict[OutPoint, Funding]:
        outputs = await asyncio.gather(*map(self._watched_output, wanted))
        scripts = {output.script for output in outputs if output is not None}
        lists, _ = await asyncio.gather(asyncio.gather(*map(self._list_unspent, scripts)), self._headers.sync())
        fundings = await asyncio.gather(
            *(
                self._funding(script, each)
                for script, unspent in zip(scripts, lists, strict=True)
                for each in unspent
                if each.outpoint in wanted
            )
        )
        return {funding.outpoint: funding for funding in fundings}

    async def _spender(self, outpoint: OutPoint) -> Spend | None:
        output = await self._watched_output(outpoint)
        if output is None:
            return None
        history, _ = await asyncio.gather(self._history(output.script), self._headers.sync())
        for each in sorted(history, key=lambda each: (each.height <= 0, -each.height)):  # the chain first
            txid = bytes.fromhex(each.tx_hash)[::-1]
            if txid != outpoint.txid and outpoint in _spent_by(await self._transaction(txid)):
                return Spend(txid, await self._headers.confirmations(txid, each.height))
        return None

    async def _is_known(self, raw: bytes) -> bool:
        """Find a transaction in the history of a script that it spends from or, when none is watched, pays to.

        Its node's word alone will not do: one with a transaction index also knows what is in orphaned blocks only. But
        where the node has it, the server's index may be about to.
        """
        try:
            transaction = CTransaction.deserialize(raw)
        except SerializationError:
            return False
        spent = await asyncio.gather(*map(self._known_output, _spent_by(transaction)))
        scripts = [output.script for output in spent if output is not None and output.script in self._watched]
        scripts += [bytes(output.scriptPubKey) for output in transaction.vout] or [b""]
        first = OutPoint(bytes(transaction.GetTxid()), 0)
        for _ in range(_INDEX_LAG_SECONDS):
            if first.txid_hex in (each.tx_hash for each in await self._history(scripts[0])):
                return True
            if await self._known_output(first) is None:
                return False
            await asyncio.sleep(1)
        return False

    async def _funding(self, script: bytes, unspent: _Unspent) -> Funding:
        outpoint = unspent.outpoint
        output, confirmations = await asyncio.gather(
            self._output(outpoint), self._headers.confirmations(outpoint.txid, unspent.height)
        )
        if output is None or (output.script, output.value_sat) != (script, unspent.value):
            msg = f"{outpoint} does not pay {unspent.value} sat to script {script.hex()}, whatever the server says"
            raise ChainFailed(msg)
        return Funding(outpoint, output.value_sat, confirmations, output.coinbase)

    async def _watched_output(self, outpoint: OutPoint) -> _Output | None:
        """Return the output; None when there is none: never was, or gone in a reorg."""
        output = await self._known_output(outpoint)
        if output is not None and output.script not in self._watched:
            msg = f"{outpoint} pays to a script that is not watched"
            raise ChainFailed(msg)
        return output

    async def _known_output(self, outpoint: OutPoint) -> _Output | None:
        try:
            return await self._output(outpoint)
        except ServerRefused as refusal:
            if refusal.code != _NODE_ERROR:
                raise
            return None

    async def _output(self, outpoint: OutPoint) -> _Output | None:
        if (known := self._outputs.get(outpoint)) is not None:
            return known
        transaction = await self._transaction(outpoint.txid)
        if outpoint.vout >= len(transaction.vout):
            return None
        paid = transaction.vout[outpoint.vout]
        output = _Output(bytes(paid.scriptPubKey), Sat(paid.nValue), bool(transaction.is_coinbase()))
        if output.script in self._watched:
            self._outputs[outpoint] = output
        return output

    async def _transaction(self, txid: bytes) -> CTransaction:
        txid_hex = txid[::-1].hex()
        try:
            raw = bytes.fromhex(await self._link.ask("blockchain.transaction.get", txid_hex, kind=str))
            transaction = CTransaction.deserialize(raw)
        except (ValueError, SerializationError) as error:
            msg = f"transaction {txid_hex} can't be read: {error}"
            raise ChainFailed(msg) from None
        if bytes(transaction.GetTxid()) != txid:
            msg = f"asked for transaction {txid_hex}, got another one"
            raise ChainFailed(msg)
        return transaction

    async def _list_unspent(self, script: bytes) -> list[_Unspent]:
        """List what is unspent, also by the server's mempool.

        ElectrumX lists what was just confirmed twice, until its mempool has followed: the one in the chain counts.
        """
        listed = await self._link.ask("blockchain.scripthash.listunspent", _script_hash(script), kind=list[_Unspent])
        return list({each.outpoint: each for each in sorted(listed, key=lambda each: each.height)}.values())

    async def _history(self, script: bytes) -> list[_Touching]:
        """List what pays to the script or spends from it."""
        return await self._link.ask("blockchain.scripthash.get_history", _script_hash(script), kind=list[_Touching])


async def _steadily(question: Callable[[], Awaitable[_T]]) -> _T:
    """Ask again when the chain moved between two answers, or the server named what its node no longer knows."""
    for pause in _PAUSES_SECONDS:
        try:
            return await question()
        except (ViewMoved, ServerRefused):
            await asyncio.sleep(pause)
    return await question()


def _spent_by(transaction: CTransaction) -> list[OutPoint]:
    return [OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n)) for txin in transaction.vin]


def _script_hash(script: bytes) -> str:
    return sha256(script).digest()[::-1].hex()
