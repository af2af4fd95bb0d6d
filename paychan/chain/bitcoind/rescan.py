"""Rescans old blocks for addresses whose past the node's wallet does not know, because it was lost.

The rescan is a task of its own, in steps of a few seconds: meanwhile new addresses can be followed, and no caller waits
for it. It resumes after a failure and, because the addresses are marked in the wallet, after a restart of the server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

import msgspec
from msgspec import Struct

from paychan.chain.base import ChainFailed
from paychan.chain.bitcoind.rpc import JsonRpc
from paychan.chain.bitcoind.wallet import WatchWallet
from paychan.protocol.types import UnixTime
from paychan.supervisor import Supervised, Supervisor

log = logging.getLogger("chain")

_MARGIN_SECONDS = 2 * 3600
"""Time by which a rescan begins earlier than requested, because block times vary (wallet.h: TIMESTAMP_WINDOW)."""

_PIECE_SECONDS = 2.0
_FIRST_PIECE = 20
_AGAIN_SECONDS = 5.0


class _Header(Struct, frozen=True):
    mediantime: UnixTime


_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_count: msgspec.json.Decoder[int] = msgspec.json.Decoder(int)
_header: msgspec.json.Decoder[_Header] = msgspec.json.Decoder(_Header)


class Rescan:
    """The addresses that wait for a rescan, each with the time from which on its past is needed."""

    def __init__(self, rpc: JsonRpc, wallet: WatchWallet, supervisor: Supervisor) -> None:
        self._rpc = rpc
        self._wallet = wallet
        self._supervisor = supervisor
        self._waiting: dict[str, UnixTime] = {}
        self._task: Supervised | None = None

    @property
    def under_way(self) -> bool:
        """While this is true, a transaction that the wallet does not know may still exist."""
        return bool(self._waiting)

    def add(self, addresses: Collection[str], since: UnixTime) -> None:
        """Follow addresses, and rescan the blocks since a time for them."""
        for address in addresses:
            self._waiting[address] = min(since, self._waiting.get(address, since))
        if self._waiting and (self._task is None or not self._task.running):
            self._task = self._supervisor.run("rescan", self._run, endless=False)

    async def wait(self, seconds: float) -> None:
        """Wait for the end of the rescan, at most this many seconds."""
        end = time.monotonic() + seconds
        while self._waiting and time.monotonic() < end:  # noqa: ASYNC110 - short and rare
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        if self._task is not None:
            await self._task.stop()

    async def _run(self, task: Supervised) -> None:
        while self._waiting:
            batch = dict(self._waiting)
            try:
                await self._wallet.follow(list(batch))
                await self._look_through(await self._height_at(min(batch.values())), task)
                await self._wallet.mark_complete(list(batch))
            except ChainFailed as error:
                log.warning("rescan for %d addresses waits: %s", len(batch), error)
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            for address, since in batch.items():
                if self._waiting.get(address) == since:
                    del self._waiting[address]
            log.info("rescan for %d addresses is done", len(batch))

    async def _look_through(self, height: int, task: Supervised) -> None:
        piece = _FIRST_PIECE
        log.info("rescan from height %d on", height)
        while height <= (newest := await self._rpc.call(_count, "getblockcount")):
            last, begun = min(height + piece - 1, newest), time.monotonic()
            await self._wallet.rescan(height, last)
            task.succeeded()
            height = last + 1
            took = time.monotonic() - begun
            piece = 2 * piece if took < _PIECE_SECONDS else max(1, piece // 2)

    async def _height_at(self, since: UnixTime) -> int:
        """Return the height of a block that is older than a time; its median time past never decreases."""
        low, high = 0, await self._rpc.call(_count, "getblockcount")
        while low < high:
            middle = (low + high + 1) // 2
            block_hash = await self._rpc.call(_text, "getblockhash", middle)
            if (await self._rpc.call(_header, "getblockheader", block_hash)).mediantime < since - _MARGIN_SECONDS:
                low = middle
            else:
                high = middle - 1
        return low
