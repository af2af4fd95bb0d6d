"""Block headers as an SPV client keeps them: connected, each with its proof of work; and merkle proofs against them.

Pure functions of bytes. For backends whose server is not the operator's own node (`electrum`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from statistics import median_high

from bitcoin.core import CTransaction, Hash
from bitcoin.core.serialize import SerializationError, uint256_from_compact
from msgspec import Struct

from paychan.chain.base import ChainFailed
from paychan.protocol.types import Network, UnixTime

HEADER_BYTES = 80

MEDIAN_BLOCKS = 11
"""BIP113: median time past is the median of the last 11 block times."""

EASIEST_TARGET = {
    # Difficulty 10^13, last seen in 2019: forging a header costs a fair share of mining a block, and earns nothing.
    Network.LIVE: (0xFFFF << 208) // 10**13,
    Network.TEST: 0x0377AE << 216,  # signet's limit (its chainparams, 0x1e0377ae), the easiest of the test networks
    Network.REGTEST: 0x7FFFFF << 232,  # 0x207fffff
}
"""Header hashes above this are refused, even if the header's own bits allow them."""


class ViewMoved(ChainFailed):
    """Answers contradict each other: the chain changed between them, or the server lies. The caller may ask again."""


class Header(Struct, frozen=True):
    """The used fields of a block header; hashes in internal byte order."""

    block_hash: bytes
    previous: bytes
    merkle_root: bytes
    time: UnixTime


class HeaderChain:
    """Connected headers from the height `base` up to the tip; a fork replaces the headers above the common block."""

    def __init__(self, network: Network) -> None:
        self._easiest = EASIEST_TARGET[network]
        self._headers: list[Header] = []
        self.base = 0

    @property
    def height(self) -> int:
        """Height of the tip; -1 without headers."""
        return self.base + len(self._headers) - 1

    @property
    def median_time(self) -> UnixTime:
        """Median time past of the tip (BIP113)."""
        return UnixTime(median_high(header.time for header in self._headers[-MEDIAN_BLOCKS:]))

    def at(self, height: int) -> Header:
        """Return the header of a height from `base` to `height`; raise `ViewMoved` for any other height."""
        if not self.base <= height <= self.height:
            msg = f"block {height} is not in the chain from {self.base} to {self.height}"
            raise ViewMoved(msg)
        return self._headers[height - self.base]

    def parse(self, raw: bytes) -> list[Header]:
        """Parse consecutive headers and check that they connect.

        Raises:
            ViewMoved: the headers don't connect.
            ChainFailed: not headers, or headers without the work that they claim.
        """
        if not raw or len(raw) % HEADER_BYTES:
            msg = f"{len(raw)} bytes are no block headers"
            raise ChainFailed(msg)
        headers = [_parse_header(raw[at : at + HEADER_BYTES], self._easiest) for at in range(0, len(raw), HEADER_BYTES)]
        for before, after in pairwise(headers):
            _check_link(before, after)
        return headers

    def joins(self, start: int, headers: Sequence[Header]) -> bool:
        """Return whether these headers, the first at height `start`, continue the known chain or replace all of it."""
        if not self._headers or start <= self.base:
            return True
        return start <= self.height + 1 and self.at(start - 1).block_hash == headers[0].previous

    def replace(self, start: int, headers: Sequence[Header]) -> None:
        """Replace the chain from height `start` on by these headers (which must join); the last one becomes the tip."""
        if not self._headers or start <= self.base:
            self.base, self._headers = start, list(headers)
        else:
            self._headers[start - self.base :] = headers

    def prepend(self, headers: Sequence[Header]) -> None:
        """Add older headers below `base`.

        Raises:
            ViewMoved: the headers do not connect to the chain.
        """
        _check_link(headers[-1], self._headers[0])
        self._headers[:0] = headers
        self.base -= len(headers)

    def check_inclusion(self, height: int, txid: bytes, branch: Sequence[bytes], position: int) -> None:
        """Check that a transaction is in the block of this height (hashes in internal byte order).

        Raises:
            ViewMoved: the block does not contain it.
        """
        root = _merkle_root(txid, branch, position)
        if root != self.at(height).merkle_root:
            msg = f"transaction {txid[::-1].hex()} is not in block {height}, although the server says so"
            raise ViewMoved(msg)


def _parse_header(raw: bytes, easiest_target: int) -> Header:
    time, bits = struct.unpack_from("<II", raw, 68)
    block_hash = bytes(Hash(raw))
    target = min(uint256_from_compact(bits), easiest_target)
    if int.from_bytes(block_hash, "little") > target:
        msg = f"block header {block_hash[::-1].hex()} lacks the work of its network"
        raise ChainFailed(msg)
    return Header(block_hash, raw[4:36], raw[36:68], UnixTime(time))


def _check_link(before: Header, after: Header) -> None:
    if after.previous != before.block_hash:
        msg = f"block header {after.block_hash[::-1].hex()} does not follow on {before.block_hash[::-1].hex()}"
        raise ViewMoved(msg)


def _merkle_root(txid: bytes, branch: Sequence[bytes], position: int) -> bytes:
    node = txid
    for sibling in branch:
        pair = sibling + node if position & 1 else node + sibling
        if len(pair) != 64 or _is_transaction(pair):
            msg = "merkle proof with an invalid node"
            raise ViewMoved(msg)
        node = bytes(Hash(pair))
        position >>= 1
    return node


def _is_transaction(pair: bytes) -> bool:
    """CVE-2017-12842: 64 bytes that are both a transaction and a node would prove transactions that don't exist."""
    try:
        CTransaction.deserialize(pair)
    except (SerializationError, ValueError):
        return False
    return True
