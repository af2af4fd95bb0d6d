"""Finds outputs that were there before the watch-only wallet followed their address, and lets the wallet know them.

Only `scantxoutset` finds these without an index. It takes a minute or two on the main network, and the node does one at
a time: so everybody who waits shares the next one, and nobody waits longer than his patience.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from decimal import Decimal

import msgspec
from msgspec import Struct

from paychan.chain.base import ChainFailed
from paychan.chain.jsonrpc import JsonRpc, RpcError
from paychan.chain.watchwallet import LONG_SECONDS, WatchWallet

MOST_OUTPUTS = 100
"""Outputs on one address that are looked at, the most valuable first: dust sent there must not keep the node busy."""

_MOST_WAITING = 1000
"""Addresses that may wait for a scan; further ones are turned away."""


class _Unspent(Struct, frozen=True, rename={"script": "scriptPubKey"}):
    txid: str
    script: str
    amount: Decimal
    height: int


class _Scan(Struct, frozen=True):
    success: bool
    unspents: tuple[_Unspent, ...] = ()


class _Search(Struct, frozen=True, eq=False):
    """An address, its script in hex, and the outcome: what went wrong, or None."""

    address: str
    script: str
    outcome: asyncio.Future[ChainFailed | None]


_scan: msgspec.json.Decoder[_Scan] = msgspec.json.Decoder(_Scan)
_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)


class FundingSearch:
    """Addresses that wait for a scan, and the task that scans."""

    def __init__(self, rpc: JsonRpc, wallet: WatchWallet) -> None:
        self._rpc = rpc
        self._wallet = wallet
        self._waiting: dict[str, _Search] = {}
        self._task: asyncio.Task[None] | None = None

    async def complete(self, address: str, script: bytes, patience_seconds: float) -> None:
        """Follow an address, and return when the wallet knows all its unspent outputs.

        Raises:
            ChainFailed: the search failed, or it goes on longer than the patience; ask again.
        """
        if len(self._waiting) >= _MOST_WAITING and address not in self._waiting:
            msg = f"{_MOST_WAITING} funding addresses wait for a scan of the unspent outputs; ask again later"
            raise ChainFailed(msg)
        new = _Search(address, script.hex(), asyncio.get_running_loop().create_future())
        outcome = self._waiting.setdefault(address, new).outcome
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work_off())
        await asyncio.wait([outcome], timeout=patience_seconds)
        failure = (
            outcome.result()
            if outcome.done()
            else ChainFailed("the node still searches its unspent outputs for this address; ask again in a minute")
        )
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """Stop searching. The node finishes a scan that runs, and nobody reads it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _work_off(self) -> None:
        while self._waiting:
            batch = list(self._waiting.values())
            try:
                found = await self._follow(batch)
            except ChainFailed as error:
                for search in batch:
                    self._end(search, error)
                continue
            for search in batch:
                self._end(search, await self._tell(search, found.get(search.script, [])))

    def _end(self, search: _Search, failure: ChainFailed | None) -> None:
        del self._waiting[search.address]
        search.outcome.set_result(failure)

    async def _follow(self, batch: list[_Search]) -> dict[str, list[_Unspent]]:
        """Scan first, then follow, so that nothing falls between; return what was found by script."""
        addresses = [search.address for search in batch]
        descriptors = await self._wallet.descriptors(addresses)
        scan = await self._rpc.call(_scan, "scantxoutset", "start", descriptors, timeout_seconds=LONG_SECONDS)
        if not scan.success:
            msg = "the node broke off its scan of the unspent outputs; ask again"
            raise ChainFailed(msg)
        await self._wallet.follow(addresses)
        found: dict[str, list[_Unspent]] = defaultdict(list)
        for unspent in sorted(scan.unspents, key=lambda unspent: unspent.amount, reverse=True):
            found[unspent.script].append(unspent)
        return found

    async def _tell(self, search: _Search, found: list[_Unspent]) -> ChainFailed | None:
        """Without its funding transaction the wallet would not notice what spends it."""
        try:
            for txid, height in dict.fromkeys((each.txid, each.height) for each in found[:MOST_OUTPUTS]):
                block_hash = await self._rpc.call(_text, "getblockhash", height)
                transaction = await self._rpc.call(_text, "getrawtransaction", txid, False, block_hash)
                proof = await self._rpc.call(_text, "gettxoutproof", [txid], block_hash)
                await self._wallet.add(transaction, proof)
            await self._wallet.mark_complete([search.address])
        except RpcError as error:
            return ChainFailed(f"can't read what funds {search.address} (pruned, or just reorganized away): {error}")
        except ChainFailed as error:
            return error
        return None
