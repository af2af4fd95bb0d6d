"""Whether a bitcoind can serve us: its network, version, how far it has come, and which blocks it still has."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from paychan.chain.base import ChainUnfit
from paychan.chain.jsonrpc import WARMING_UP, JsonRpc, RpcError, Unauthorized, Unreachable
from paychan.protocol.types import Network, UnixTime

_OLDEST_VERSION = 250_000
"""Core 25: `include_immature_coinbase` of listunspent. Core 24 brought gettxspendingprevout."""

_CHAINS = {
    Network.LIVE: ("main",),
    Network.TEST: ("test", "testnet4", "signet"),
    Network.REGTEST: ("regtest",),
}
"""Values of getblockchaininfo's `chain`. The test networks share our addresses' version bytes."""

_RESCAN_MARGIN_SECONDS = 2 * 3600
"""How much earlier than asked the node begins a rescan, as block times may differ (wallet.h: TIMESTAMP_WINDOW)."""


class ChainInfo(Struct, frozen=True):
    """What `getblockchaininfo` says; times in Unix seconds."""

    chain: str
    blocks: int
    bestblockhash: str
    time: UnixTime
    mediantime: UnixTime
    initialblockdownload: bool
    pruneheight: int = 0
    """The first block that is there in full."""


class _NetworkInfo(Struct, frozen=True):
    version: int


class _Header(Struct, frozen=True):
    time: UnixTime


_chain_info: msgspec.json.Decoder[ChainInfo] = msgspec.json.Decoder(ChainInfo)
_network_info: msgspec.json.Decoder[_NetworkInfo] = msgspec.json.Decoder(_NetworkInfo)
_header: msgspec.json.Decoder[_Header] = msgspec.json.Decoder(_Header)
_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)


class NodeState:
    """The node behind `rpc`, which must be one of `network`."""

    def __init__(self, rpc: JsonRpc, network: Network) -> None:
        self._rpc = rpc
        self._network = network

    async def read(self) -> ChainInfo:
        """Ask for the state of the chain, and make sure each time that it is ours: a URL may get another node behind it.

        Raises:
            ChainUnfit: it is another network's.
        """
        info = await self._rpc.call(_chain_info, "getblockchaininfo")
        if info.chain not in _CHAINS[self._network]:
            want = " or ".join(_CHAINS[self._network])
            msg = (
                f'{self._rpc.url} is a node of "{info.chain}", want {want} for network = "{self._network.value}". '
                "Correct chain.url or network"
            )
            raise ChainUnfit(msg)
        return info

    async def check(self) -> None:
        """Make sure that somebody is there who lets us in, and has what we need.

        Raises:
            ChainUnfit: what is wrong, and the mend.
        """
        try:
            info = await self.read()
            version = (await self._rpc.call(_network_info, "getnetworkinfo")).version
        except Unreachable as error:
            msg = f"no bitcoind answers: {error}. Start it with server=1, or correct chain.url"
            raise ChainUnfit(msg) from error
        except Unauthorized as error:
            msg = f"{error}. Name the node's .cookie file, or a file with user:password, in chain.credentials_file"
            raise ChainUnfit(msg) from error
        except RpcError as error:
            if error.code != WARMING_UP:
                raise
            msg = f"the node is still starting: {error.reason} Start again when it is done"
            raise ChainUnfit(msg) from error
        if version < _OLDEST_VERSION:
            msg = f"the node has version {version}, want {_OLDEST_VERSION} (25.0) or later. Update it"
            raise ChainUnfit(msg)
        if info.initialblockdownload:
            msg = (
                f"the node is in its initial block download: height {info.blocks}, block of {info.time} (Unix time). "
                "Start again when it has caught up; on regtest, mine a block"
            )
            raise ChainUnfit(msg)

    async def need_blocks(self, since: UnixTime) -> None:
        """Make sure that a rescan since a time finds its blocks.

        Raises:
            ChainUnfit: they are pruned.
        """
        oldest = (await self.read()).pruneheight
        if oldest == 0:
            return
        block_hash = await self._rpc.call(_text, "getblockhash", oldest)
        if (await self._rpc.call(_header, "getblockheader", block_hash)).time > since - _RESCAN_MARGIN_SECONDS:
            msg = (
                f"the node has pruned its blocks below {oldest}, and unfinished channels need those since {since} "
                "(Unix time). Give chain.url a node that has them, or the wallet that followed these channels"
            )
            raise ChainUnfit(msg)
