"""Confirmations proved by an Electrum server: its headers, kept up to date, and its merkle proofs."""

from __future__ import annotations

import asyncio
from typing import Annotated

from msgspec import Meta, Struct

from paychan.chain.base import ChainFailed, Tip
from paychan.chain.electrum.session import ElectrumLink
from paychan.chain.spv import HEADER_BYTES, MEDIAN_BLOCKS, HeaderChain
from paychan.protocol.types import Network

_MOST_HEADERS = 2016
"""Most headers that a server returns at a time."""

HashHex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""A hash as displayed: reversed, lower-case hex."""


class _Height(Struct):
    height: Annotated[int, Meta(ge=0)]


class _Headers(Struct):
    """Protocol 1.4 puts all headers into `hex`, 1.6 puts each into `headers`."""

    hex: str = ""
    headers: tuple[str, ...] = ()


class _Proof(Struct):
    merkle: list[HashHex]
    pos: Annotated[int, Meta(ge=0)]


class ElectrumHeaders:
    """The server's chain from the oldest requested block up to the tip."""

    def __init__(self, link: ElectrumLink, network: Network) -> None:
        self._link = link
        self._chain = HeaderChain(network)
        self._changing = asyncio.Lock()
        self._proven: dict[bytes, bytes] = {}

    @property
    def tip(self) -> Tip | None:
        """The tip of the last `sync`."""
        if self._chain.height < 0:
            return None
        header = self._chain.at(self._chain.height)
        return Tip(self._chain.height, header.block_hash[::-1].hex(), header.time, self._chain.median_time)

    async def sync(self) -> Tip:
        """Follow the server to its tip, across any reorg."""
        async with self._changing:
            while await self._follow() >= _MOST_HEADERS:
                pass
            await self._extend_down(self._chain.height - MEDIAN_BLOCKS + 1)
            tip = self.tip
        if tip is None:
            msg = "the server has no block"
            raise ChainFailed(msg)
        return tip

    async def holds(self, seen: Tip) -> bool:
        """Return whether this block is in the server's chain."""
        tip = await self.sync()
        if seen.height > tip.height:
            return False
        async with self._changing:
            await self._extend_down(seen.height)
        return self._chain.at(seen.height).block_hash[::-1].hex() == seen.block_hash

    async def confirmations(self, txid: bytes, height: int) -> int:
        """Count the blocks from the one that is said to contain a transaction (internal txid); height 0 or -1: in none.

        Raises:
            ViewMoved, ServerRefused: that block does not contain it, or no longer.
        """
        if height <= 0:
            return 0
        if height > self._chain.height:
            await self.sync()  # a new block was mined meanwhile
        async with self._changing:
            await self._extend_down(height)
        if self._proven.get(txid) != self._chain.at(height).block_hash:
            question = (txid[::-1].hex(), height)
            proof = await self._link.ask("blockchain.transaction.get_merkle", *question, kind=_Proof)
            branch = [bytes.fromhex(each)[::-1] for each in proof.merkle]
            self._chain.check_inclusion(height, txid, branch, proof.pos)
            self._proven[txid] = self._chain.at(height).block_hash
        return self._chain.height - height + 1

    async def _follow(self) -> int:
        """Fetch the headers above the last common block; return their number."""
        start, raw = await self._newest()
        headers = self._chain.parse(raw)
        while not self._chain.joins(start, headers):
            count = min(start, _MOST_HEADERS)
            start -= count
            raw = await self._fetch(start, count) + raw
            headers = self._chain.parse(raw)
        self._chain.replace(start, headers)
        return len(headers)

    async def _newest(self) -> tuple[int, bytes]:
        """Fetch the headers that the median time needs and all above; return them with the height of the first."""
        if self._chain.height >= 0:
            start = max(0, self._chain.height - MEDIAN_BLOCKS + 1)
            if raw := await self._fetch(start, _MOST_HEADERS):
                return start, raw
        tip = await self._link.ask("blockchain.headers.subscribe", kind=_Height)
        start = max(0, tip.height - MEDIAN_BLOCKS + 1)
        return start, await self._fetch(start, _MOST_HEADERS)

    async def _extend_down(self, height: int) -> None:
        while self._chain.base > max(0, height):
            start = max(0, height, self._chain.base - _MOST_HEADERS)
            self._chain.prepend(self._chain.parse(await self._fetch(start, self._chain.base - start)))

    async def _fetch(self, start: int, count: int) -> bytes:
        """Fetch headers upwards from a height; fewer if the chain ends."""
        answer = await self._link.ask("blockchain.block.headers", start, count, kind=_Headers)
        try:
            raw = bytes.fromhex(answer.hex + "".join(answer.headers))
        except ValueError:
            raw = b""
        if len(raw) > count * HEADER_BYTES:
            msg = f"requested {count} block headers, got {len(raw)} bytes"
            raise ChainFailed(msg)
        return raw
