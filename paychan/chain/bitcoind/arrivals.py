"""Finds new payments to sought scripts, in blocks and in the mempool, without naming the scripts to the node.

Each scan reads the new data since the last one: a block once, a transaction of the mempool once. Both arrive as hex, in
which the sought scripts are searched as text. If one occurs, the node decodes the transactions, and only `gettxout`
decides whether such an output exists. So no block of other parties is parsed here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic

import msgspec
from msgspec import Struct

from paychan.chain.base import ChainFailed
from paychan.chain.bitcoind.rpc import JsonRpc, RpcError
from paychan.chain.bitcoind.sought_scripts import SoughtScripts
from paychan.chain.bitcoind.wallet import NOT_FOUND
from paychan.protocol.types import OutPoint
from paychan.supervisor import Supervised, Supervisor

_POLL_SECONDS = 1.0
_PAUSE_SECONDS = 10.0
"""Pause after a failed scan."""

_MOST_BLOCKS = 20
"""Most blocks read in one scan: after a longer gap, a scan of the unspent outputs finds the payments."""

_BLOCKS_KNOWN = 200

_MOST_TRANSACTIONS = 1000
"""Most transactions of the mempool read in one scan; the newest first, the ones present at the start in later scans."""

_MEMPOOL_SHARE = 20
"""Reading the mempool takes at most a twentieth of the time, unless a caller waits for it."""


class _Header(Struct, frozen=True):
    previousblockhash: str = ""


class _Script(Struct, frozen=True):
    hex: str


class _Output(Struct, frozen=True, rename={"script": "scriptPubKey"}):
    n: int
    script: _Script


class _Transaction(Struct, frozen=True):
    txid: str
    vout: tuple[_Output, ...]


class _Block(Struct, frozen=True):
    tx: tuple[_Transaction, ...]


_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_names: msgspec.json.Decoder[list[str]] = msgspec.json.Decoder(list[str])
_header: msgspec.json.Decoder[_Header] = msgspec.json.Decoder(_Header)
_block: msgspec.json.Decoder[_Block] = msgspec.json.Decoder(_Block)
_transaction: msgspec.json.Decoder[_Transaction] = msgspec.json.Decoder(_Transaction)


class Arrivals:
    """Scans the node behind `rpc` while any script is sought."""

    def __init__(self, rpc: JsonRpc, scripts: SoughtScripts, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._rpc = rpc
        self._scripts = scripts
        self._looking = asyncio.Lock()
        self._looks = 0
        self._blocks: deque[str] = deque(maxlen=_BLOCKS_KNOWN)
        self._listed: set[str] = set()
        self._read: set[str] = set()
        self._next_listing = 0.0
        self._task: Supervised | None = None

    def begin(self) -> None:
        """Scan until `close`; a failed scan is repeated."""
        if self._task is None or not self._task.running:
            self._task = self._supervisor.run("arrivals", self._scan_forever)

    async def close(self) -> None:
        if self._task is not None:
            await self._task.stop()

    async def look(self) -> None:
        """Return after a scan that began after this call; concurrent callers share it. Raises `ChainFailed`."""
        begun = self._looks
        async with self._looking:
            if self._looks == begun:
                self._looks += 1
                await self._look()

    async def _scan_forever(self, task: Supervised) -> None:
        while True:
            try:
                if len(self._scripts):
                    await self.look()
            except ChainFailed:
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                task.succeeded()
                await asyncio.sleep(_POLL_SECONDS)

    async def _look(self) -> None:
        best = await self._rpc.call(_text, "getbestblockhash")
        if best not in self._blocks:
            await self._read_blocks(best)
        await asyncio.sleep(max(0.0, min(self._next_listing - monotonic(), _POLL_SECONDS)))
        await self._read_mempool()

    async def _read_blocks(self, best: str) -> None:
        """Read the blocks above the last one that was read, the oldest first."""
        new: list[str] = []
        block_hash = best
        while block_hash and block_hash not in self._blocks and len(new) <= _MOST_BLOCKS:
            new.append(block_hash)
            block_hash = (await self._rpc.call(_header, "getblockheader", block_hash)).previousblockhash
        if not self._blocks or len(new) > _MOST_BLOCKS:
            self._scripts.doubt_all()
            self._blocks.append(best)
            return
        for each in reversed(new):
            if self._scripts.named_in(await self._rpc.call(_text, "getblock", each, 0)):
                self._note((await self._rpc.call(_block, "getblock", each, 2)).tx)
            self._blocks.append(each)

    async def _read_mempool(self) -> None:
        begun = monotonic()
        names = await self._rpc.call(_names, "getrawmempool")
        listed = set(names)
        self._read &= listed
        unread = listed - self._read
        new = unread - self._listed
        wanted = [*new, *(unread - new)][:_MOST_TRANSACTIONS]
        self._listed = listed
        for txid, transaction in zip(wanted, await self._transactions(wanted), strict=True):
            if self._scripts.named_in(transaction):
                await self._read_transaction(txid)
            self._read.add(txid)
        self._next_listing = monotonic() + _MEMPOOL_SHARE * (monotonic() - begun)

    async def _transactions(self, txids: Sequence[str]) -> list[str]:
        """Return the transactions in hex; "" for one that has left the mempool meanwhile."""
        return [found or "" for found in await self._rpc.batch_found(_text, "getrawtransaction", [[i] for i in txids])]

    async def _read_transaction(self, txid: str) -> None:
        try:
            self._note([await self._rpc.call(_transaction, "getrawtransaction", txid, True)])
        except RpcError as error:
            if error.code != NOT_FOUND:
                raise

    def _note(self, transactions: Sequence[_Transaction]) -> None:
        for transaction in transactions:
            for output in transaction.vout:
                self._scripts.note(output.script.hex, [OutPoint.parse(transaction.txid, output.n)])
