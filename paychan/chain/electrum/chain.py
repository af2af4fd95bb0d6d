"""A chain backend over an Electrum server (ElectrumX, electrs, Fulcrum): for operators without a full node.

Trust. The server can't forge confirmed data: a payment to the operator, its amount, its spending or its depth.
Transactions are checked against their ids, confirmations against merkle proofs and connected headers with their work;
on the live network the required difficulty makes a forgery cost more than most channels hold. The server *can* hide
data: new blocks (which the age of the tip reveals), a spend or a double-spend. It can also invent unconfirmed
transactions and fee estimates, and it learns the operator's addresses. So the operator should run the server, or use
two servers that are unlikely to collude.

Consensus rules other than work are not checked. Blocks are never read. Of a transaction that pays to a watched script
or spends from one, only the inputs' outpoints and the outputs are read.
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
"""Most outputs of one address that are read, the most valuable first: thousands of dust outputs don't merit requests."""

_PAUSES_SECONDS = (0.1, 0.4, 1.5)
"""Pauses between tries; after these, a server has finished a reorg."""

_INDEX_LAG_SECONDS = 10
"""ElectrumX polls its node every five seconds."""

_NODE_ERROR = 2
"""Error code for a refusal by the server's own node; for transaction.get: the node knows no such transaction."""

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
    """A transaction that pays to a script or spends from it; height 0 or -1 in the mempool."""

    tx_hash: HashHex
    height: int


class _Output(Struct, frozen=True):
    script: bytes
    value_sat: Sat
    coinbase: bool


class ElectrumChain:
    """A `paychan.chain.base.Chain` over the Electrum protocol 1.4 to 1.6.

    A server that leaves one request unanswered for `timeout_seconds` has failed; a call makes up to four requests in
    sequence. ElectrumX delays small answers by up to a second, its view may be seconds behind its node's, and it
    follows a reorg once the new branch is longer. The backend forgets its watches at its end.
    """

    spends_need_rescan = False

    def __init__(
        self, url: str, network: Network, *, timeout_seconds: float, certificate_file: Path | None = None
    ) -> None:
        """Create the backend without connecting; `url` and `certificate_file` are `ElectrumLink`'s, whose errors this raises."""
        self._news = asyncio.Event()
        self._link = ElectrumLink(url, network, timeout_seconds, certificate_file, self._news.set)
        self._headers = ElectrumHeaders(self._link, network)
        self._watched: set[bytes] = set()
        self._outputs: dict[OutPoint, _Output] = {}
        self._shortcoming = ""

    @property
    def capabilities(self) -> Capabilities:
        """The few known abilities of the node behind the server."""
        return Capabilities(news=True, shortcomings=tuple(filter(None, [self._shortcoming])))

    async def check(self) -> None:
        """Check that the server is reachable, of the right network, and speaks a known protocol version.

        Only the tip's time shows whether the server is up to date.
        """
        try:
            await self.tip()
        except ChainUnfit:
            raise
        except ChainFailed as failure:
            msg = f"{failure}: is an Electrum server running there, and has it finished its synchronization?"
            raise ChainUnfit(msg) from None

    async def tip(self) -> Tip:
        return await self._headers.sync()

    async def wait_for_change(self, seen: Tip, timeout_seconds: float) -> None:
        """Return when the server announces a change, or when the connection is lost or restored."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._link.wait_until_connected()
                if self._headers.tip not in (seen, None):
                    return
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()

    async def watch(self, payees: Collection[Payee], since: UnixTime | None = None) -> None:  # noqa: ARG002 - servers index all
        scripts = {each.funding_script for each in payees}
        self._watched |= scripts
        await self._link.follow(_script_hash(script) for script in scripts)

    def expect(self, payee: Payee) -> None:
        """The server indexes all scripts, so there is nothing to do."""

    async def adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:  # noqa: ARG002 - the server knows them
        await self.watch([payee])

    async def funding(self, payee: Payee, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List the outputs, the most valuable first, at most a hundred."""
        return await _steadily(lambda: self._fundings(payee.funding_script, at))

    async def find_all(self, payee: Payee) -> tuple[Funding, ...]:
        return await self.funding(payee)

    async def deposits(self, payees: Collection[Payee]) -> list[tuple[Payee, Funding]]:
        found = await asyncio.gather(*(self.funding(payee) for payee in payees))
        return [(payee, each) for payee, fundings in zip(payees, found, strict=True) for each in fundings]

    async def unspent(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Funding]:
        return await _steadily(lambda: self._still_unspent(frozenset(outpoints)))

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        """Search the history of the outpoint's script, the newest blocks first, the mempool last."""
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

    async def replacement_cost(self, txid: bytes) -> Sat | None:  # noqa: ARG002 - the protocol has no such request
        return None

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        """Broadcast; with a child as a package if the server accepts packages, else one by one.

        A transaction that the server's node refuses may already be known: then the broadcast is a success.
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
        """Search for a transaction in the history of a watched script that it spends from, or else of one that it pays to.

        The node's answer alone does not suffice: a node with a transaction index also knows transactions of orphaned
        blocks. But if the node has the transaction, the server's index may follow soon.
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
            msg = f"{outpoint} does not pay {unspent.value} sat to script {script.hex()}, although the server says so"
            raise ChainFailed(msg)
        return Funding(outpoint, output.value_sat, confirmations, output.coinbase)

    async def _watched_output(self, outpoint: OutPoint) -> _Output | None:
        """Return the output; None if it does not exist, or disappeared in a reorg."""
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
            msg = f"requested transaction {txid_hex}, got another one"
            raise ChainFailed(msg)
        return transaction

    async def _list_unspent(self, script: bytes) -> list[_Unspent]:
        """List the unspent outputs, including those of the server's mempool.

        ElectrumX lists a newly confirmed output twice until its mempool is updated: the entry with a block counts.
        """
        listed = await self._link.ask("blockchain.scripthash.listunspent", _script_hash(script), kind=list[_Unspent])
        return list({each.outpoint: each for each in sorted(listed, key=lambda each: each.height)}.values())

    async def _history(self, script: bytes) -> list[_Touching]:
        """List the transactions that pay to the script or spend from it."""
        return await self._link.ask("blockchain.scripthash.get_history", _script_hash(script), kind=list[_Touching])


async def _steadily(question: Callable[[], Awaitable[_T]]) -> _T:
    """Repeat a query if the chain changed between two answers, or if the server named data that its node lacks."""
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
