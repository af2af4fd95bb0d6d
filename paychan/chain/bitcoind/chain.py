"""The chain as the operator's bitcoind sees it: Bitcoin Core 25 or later, pruned or not, without txindex.

The data sources, and the reasons for them:

* Payments to scripts of unopened channels: new blocks and mempool transactions are searched for all of them
  (`arrivals`); earlier payments are found by one `scantxoutset` for all waiting callers (`utxo_scan`). The node stores
  nothing about these scripts; this process stores a bounded table in memory (`sought_scripts`).
* Payments to scripts of opened channels: a watch-only descriptor wallet inside the node, created by the server
  (`wallet`). It sees the mempool, catches up by itself after any restart, and works on pruned nodes; an index would
  have to be built.
* Whether an output exists: `gettxout` with the mempool, which is the node's validated set of unspent outputs, never the
  wallet's opinion. Script, value, depth and coinbase flag are read only from there.
* The transaction that spent it: `gettxspendingprevout` for the mempool; for the chain the wallet's transactions, whose
  depth the node counts anew at every call, so reorganized, conflicted and abandoned ones don't count.
* Broadcasts and fees: the node's mempool (`mempool`).
* Changes: the hash of the best block is polled every second, which costs the node little. If the node offers ZMQ, it
  ends that second early and announces mempool changes. So no fallback is needed when ZMQ is silent or broken.

Payments need no call to the node. Errors are distinguished by code, never by text, which differs between versions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from paychan.chain.base import Capabilities, ChainFailed, Funding, Payee, Spend, Tip
from paychan.chain.bitcoind.funding import NodeFunding, as_funding, unspent_outputs
from paychan.chain.bitcoind.mempool import NodeMempool
from paychan.chain.bitcoind.node import NodeState
from paychan.chain.bitcoind.rescan import Rescan
from paychan.chain.bitcoind.rpc import JsonRpc, RpcError
from paychan.chain.bitcoind.wallet import LONG_SECONDS, NOT_FOUND, WatchWallet
from paychan.chain.bitcoind.zmq import HAS_ZMQ, ZmqFeed, reachable
from paychan.protocol.fees import ChainFees
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.supervisor import Supervisor

_POLL_SECONDS = 1.0


class _BlockHeader(Struct, frozen=True):
    confirmations: int  # -1 outside of the best chain


class _Publisher(Struct, frozen=True):
    type: str
    address: str


_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_seconds: msgspec.json.Decoder[int] = msgspec.json.Decoder(int)
_block_header: msgspec.json.Decoder[_BlockHeader] = msgspec.json.Decoder(_BlockHeader)
_publishers: msgspec.json.Decoder[list[_Publisher]] = msgspec.json.Decoder(list[_Publisher])


class BitcoindChain:
    """A `paychan.chain.base.Chain` by JSON-RPC at `url`.

    `credentials` is a file with "user:password", such as the node's .cookie; it is read again whenever the node refuses
    it. `rescan_patience_seconds` is the longest time for which `watch` waits for a rescan, which continues as its own
    task. `search_seconds` is the longest wait for a scan of all unspent outputs; 0: `timeout_seconds`. `zmq` is "auto"
    for the node's own list of publishers, an address ("tcp://host:port"), or "" for none.
    """

    spends_need_rescan = True

    def __init__(
        self,
        url: str,
        network: Network,
        *,
        credentials: Path,
        wallet: str = "paychan",
        timeout_seconds: float = 10.0,
        zmq: str = "auto",
        search_seconds: float = 0.0,
        supervisor: Supervisor | None = None,
        rescan_patience_seconds: float = LONG_SECONDS,
    ) -> None:
        self._network = network
        self._timeout_seconds = timeout_seconds
        self._zmq = zmq
        self._rpc = JsonRpc(url, credentials, timeout_seconds)
        self._state = NodeState(self._rpc, network)
        self._supervisor = supervisor or Supervisor()
        self._wallet = WatchWallet(self._rpc, wallet, timeout_seconds)
        self._rescan = Rescan(self._rpc, self._wallet, self._supervisor)
        self._mempool = NodeMempool(self._rpc, self._wallet)
        self._outputs = NodeFunding(
            self._rpc, self._wallet, network, search_seconds or timeout_seconds, self._supervisor
        )
        self._feed: ZmqFeed | None = None
        self._capabilities = Capabilities()
        self._rescan_patience_seconds = rescan_patience_seconds
        self._uptime = 0
        self._checked_at = -1
        """Number of the interruption after which the node was last checked."""

    @property
    def capabilities(self) -> Capabilities:
        """The abilities that the node reported at the last check."""
        found = self._capabilities
        shortcomings = found.shortcomings
        if found.relays and not self._mempool.estimates:
            shortcomings += ("the node refuses to estimate fees: only the configured curve decides",)
        return replace(found, news=self._feed is not None, memory=self._wallet.made, shortcomings=shortcomings)

    async def check(self) -> None:
        """Check that the node is usable, load or create the server's wallet, and subscribe to ZMQ.

        Raises:
            ChainUnfit: the message names the problem and its remedy.
        """
        interruptions = self._rpc.interruptions
        self._capabilities = await self._state.check()
        await self._wallet.open()
        await self._listen()
        self._outputs.begin()
        self._checked_at = interruptions

    async def tip(self) -> Tip:
        """Return the newest block. After an interruption, check the node first: it may be another one."""
        for _ in range(2):
            if self._checked_at != self._rpc.interruptions or await self._was_started_again():
                await self.check()
            info = await self._state.read()
            if self._checked_at == self._rpc.interruptions:
                break
        return Tip(info.blocks, info.bestblockhash, info.time, info.mediantime)

    async def wait_for_change(self, seen: Tip, timeout_seconds: float) -> None:
        """Return when the tip differs from `seen` or the mempool changed; at the latest after the time-out.

        Mempool changes end the wait at most once a second, and only with ZMQ.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while await self._rpc.call(_text, "getbestblockhash") == seen.block_hash:
            left = min(_POLL_SECONDS, deadline - loop.time())
            if left <= 0:
                return
            if self._feed is None:
                await asyncio.sleep(left)
            elif await self._feed.wait(left):
                return

    async def watch(self, payees: Collection[Payee], since: UnixTime | None = None) -> None:
        """Follow payments to these scripts and spends of them. The node remembers the scripts across all restarts.

        A script that the node does not follow yet is followed from now on, and earlier payments to it are searched.
        With `since`, for a wallet that was lost, the node rescans the blocks from that time on. The rescan may end
        later: until then the spending transaction of an output may be unknown.

        Raises:
            ChainUnfit: the node has pruned blocks that are needed.
        """
        addresses = await self._wallet.incomplete([each.funding_address(self._network) for each in payees])
        if addresses and since is not None:
            await self._state.need_blocks(since)
            is_first = not self._rescan.under_way
            self._rescan.add(addresses, since)
            if is_first:
                await self._rescan.wait(self._rescan_patience_seconds)
            return
        if addresses:
            await self._wallet.follow(addresses)
            await self._wallet.mark_adopted(*addresses)
            self._outputs.complete_soon()

    def expect(self, payee: Payee) -> None:
        """Search new blocks and transactions for a script; keeps it only in memory."""
        self._outputs.expect(payee)

    async def funding(self, payee: Payee, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List the unspent outputs that pay exactly to this script; see `NodeFunding.funding`."""
        return await self._outputs.funding(payee, at)

    async def deposits(self, payees: Collection[Payee]) -> list[tuple[Payee, Funding]]:
        """List the unspent outputs that pay to these followed scripts."""
        return await self._outputs.deposits(payees)

    async def adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:
        """Follow a script permanently, with the outputs that already pay to it; see `NodeFunding.adopt`."""
        await self._outputs.adopt(payee, outpoints)

    async def find_all(self, payee: Payee) -> tuple[Funding, ...]:
        """List all unspent outputs that pay to this script, and follow it permanently; for a payer's own script."""
        return await self._outputs.find_all(payee)

    async def unspent(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Funding]:
        """Return those of these outpoints that are unspent, in the chain and in the mempool."""
        found = await unspent_outputs(self._rpc, outpoints)
        return {outpoint: as_funding(outpoint, tx_out) for outpoint, tx_out in found.items()}

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        """Return the transaction that spends a watched outpoint, in the chain or else in the mempool.

        None while it is unspent, and if its transaction disappeared from chain and mempool; `unspent` distinguishes
        these. During a rescan, an output without a known spender raises `ChainFailed`. The sources are read in the
        order in which a spending transaction moves, so that it is not missed between two calls.
        """
        if await unspent_outputs(self._rpc, [outpoint]):
            return None
        txid = await self._mempool.spender(outpoint)
        if txid is not None:
            return Spend(txid, 0)
        spend = await self._wallet.spender(outpoint)
        if spend is None and self._rescan.under_way:
            msg = f"the node is still scanning its blocks for the transaction that spent {outpoint}"
            raise ChainFailed(msg)
        return spend

    async def transaction(self, txid: bytes) -> bytes:
        """Return, serialized, a transaction (internal txid) that `spender` has just named."""
        return await self._wallet.transaction(txid)

    async def funding_transaction(self, outpoint: OutPoint) -> bytes:
        """Return, serialized, the transaction of an unspent output. Raises `ChainFailed` if its block was pruned."""
        return bytes.fromhex((await self._wallet.read_unspent(outpoint))[0])

    async def holds(self, seen: Tip) -> bool:
        """Return whether this block is still in the chain; False also if a new node does not know it."""
        try:
            header = await self._rpc.call(_block_header, "getblockheader", seen.block_hash)
        except RpcError as error:
            if error.code != NOT_FOUND:
                raise
            return False
        return header.confirmations > 0

    async def fees(self) -> ChainFees:
        """Return the node's estimate, if any, and the fee rates that its mempool accepts now."""
        return await self._mempool.fees()

    async def replacement_cost(self, txid: bytes) -> Sat | None:
        """Return the fees of a transaction in the mempool and of all its descendants."""
        return await self._mempool.replacement_cost(txid)

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        """Broadcast a signed transaction, again if it is already in the mempool.

        A `child` is broadcast with it as a package (Bitcoin Core 27 and later), which a parent with a too low fee
        needs.

        Raises:
            ChainFailed: refused, with the node's reason.
        """
        if child:
            await self._mempool.publish_package(transaction, child)
        else:
            await self._mempool.publish(transaction)

    async def close(self) -> None:
        """Close the connections and stop the tasks."""
        await self._rescan.close()
        await self._wallet.close()
        await self._outputs.close()
        if self._feed is not None:
            await self._feed.close()
            self._feed = None
        await self._rpc.close()

    async def _was_started_again(self) -> bool:
        """Return whether the node restarted: a restart between two calls may break no open connection."""
        before, self._uptime = self._uptime, await self._rpc.call_if_possible(0, _seconds, "uptime")
        return self._uptime < before

    async def _listen(self) -> None:
        addresses = {self._zmq} - {"", "auto"}
        if self._zmq == "auto":
            host = urlsplit(self._rpc.url).hostname or ""
            offered = await self._rpc.call_if_possible([], _publishers, "getzmqnotifications")
            wanted = [each.address for each in offered if each.type in ("pubhashblock", "pubsequence")]
            addresses = {connectable for address in wanted if (connectable := reachable(address, host)) is not None}
        if self._feed is not None and self._feed.addresses != addresses:
            await self._feed.close()
            self._feed = None
        if addresses and self._feed is None and HAS_ZMQ:
            self._feed = ZmqFeed(addresses, self._supervisor)
