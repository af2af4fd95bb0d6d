"""Whether a bitcoind is usable: its network, its version, its synchronization, and the blocks that it still has."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from paychan.chain.base import Capabilities, ChainUnfit, WrongNetwork
from paychan.chain.bitcoind.rpc import WARMING_UP, JsonRpc, RpcError, Unauthorized, Unreachable
from paychan.protocol.types import Network, UnixTime

_OLDEST_VERSION = 250_000
"""Core 25: `include_immature_coinbase` of listunspent. Core 24 brought gettxspendingprevout."""

_ALWAYS_FULL_RBF = 290_000
"""Core 28 made -mempoolfullrbf the default, 29 removed the setting."""

_TRUC_VERSION = 280_000
"""Core 28 relays version 3 transactions, as TRUC."""

_CHAINS = {
    Network.LIVE: ("main",),
    Network.TEST: ("test", "testnet4", "signet"),
    Network.REGTEST: ("regtest",),
}
"""Values of getblockchaininfo's `chain`. The test networks share the version bytes of addresses."""

_RESCAN_MARGIN_SECONDS = 2 * 3600
"""Time by which the node begins a rescan earlier than requested, because block times vary (wallet.h: TIMESTAMP_WINDOW)."""


class ChainInfo(Struct, frozen=True):
    """The answer of `getblockchaininfo`; times in Unix seconds."""

    chain: str
    blocks: int
    bestblockhash: str
    time: UnixTime
    mediantime: UnixTime
    initialblockdownload: bool
    pruneheight: int = 0
    """Height of the first block that is complete."""


class _NetworkInfo(Struct, frozen=True):
    version: int
    subversion: str = ""
    localrelay: bool = True


class _MempoolInfo(Struct, frozen=True):
    """`truc_policy` exists in Bitcoin Knots; Core does not report it."""

    maxmempool: int = 0
    fullrbf: bool | None = None
    truc_policy: str = ""


class _Header(Struct, frozen=True):
    time: UnixTime


_chain_info: msgspec.json.Decoder[ChainInfo] = msgspec.json.Decoder(ChainInfo)
_network_info: msgspec.json.Decoder[_NetworkInfo] = msgspec.json.Decoder(_NetworkInfo)
_mempool_info: msgspec.json.Decoder[_MempoolInfo] = msgspec.json.Decoder(_MempoolInfo)
_header: msgspec.json.Decoder[_Header] = msgspec.json.Decoder(_Header)
_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)


class NodeState:
    """The node behind `rpc`, which must belong to `network`."""

    def __init__(self, rpc: JsonRpc, network: Network) -> None:
        self._rpc = rpc
        self._network = network

    async def read(self) -> ChainInfo:
        """Read the state of the chain, and check its network each time: a URL may lead to another node later.

        Raises:
            WrongNetwork: the node belongs to another network.
        """
        info = await self._rpc.call(_chain_info, "getblockchaininfo")
        if info.chain not in _CHAINS[self._network]:
            want = " or ".join(_CHAINS[self._network])
            msg = (
                f'{self._rpc.url} is a node of "{info.chain}", expected {want} for network = "{self._network.value}". '
                "Correct chain.url or network"
            )
            raise WrongNetwork(msg)
        return info

    async def check(self) -> Capabilities:
        """Check that a node answers, accepts the credentials and fits the requirements; return its abilities.

        Raises:
            ChainUnfit: the message names the problem and its remedy.
        """
        try:
            info = await self.read()
            network = await self._rpc.call(_network_info, "getnetworkinfo")
        except Unreachable as error:
            msg = f"no bitcoind answers: {error}. Start it with server=1, or correct chain.url"
            raise ChainUnfit(msg) from error
        except Unauthorized as error:
            if isinstance(error.__cause__, FileNotFoundError) and not await self._rpc.listens():
                msg = (
                    f"no bitcoind runs at {self._rpc.url}: nothing listens there, and {self._rpc.credentials}, which a "
                    "node writes at its start, is missing. Start it with server=1, or correct chain.url"
                )
                raise ChainUnfit(msg) from error
            msg = f"{error}. Set chain.credentials_file to the node's .cookie file, or to a file with user:password"
            raise ChainUnfit(msg) from error
        except RpcError as error:
            if error.code != WARMING_UP:
                raise
            msg = f"the node is still starting: {error.reason}"
            raise ChainUnfit(msg) from error
        if network.version < _OLDEST_VERSION:
            msg = f"the node has version {network.version}, expected {_OLDEST_VERSION} (25.0) or later. Update it"
            raise ChainUnfit(msg)
        if info.initialblockdownload:
            msg = (
                f"the node is in its initial block download: height {info.blocks}, block of {info.time} (Unix time). "
                "It is usable when it has caught up; on regtest, mine a block"
            )
            raise ChainUnfit(msg)
        return await self._capabilities(network, info)

    async def _capabilities(self, network: _NetworkInfo, info: ChainInfo) -> Capabilities:
        """Read the node's abilities; all of them except the version are optional."""
        mempool = await self._rpc.call_if_possible(_MempoolInfo(), _mempool_info, "getmempoolinfo")
        full_rbf = mempool.fullrbf
        if full_rbf is None and network.version >= _ALWAYS_FULL_RBF:
            full_rbf = True
        truc = mempool.truc_policy in ("accept", "enforce") if mempool.truc_policy else None
        if truc is None and network.version >= _TRUC_VERSION:
            truc = True
        shortcomings = []
        if not network.localrelay:
            shortcomings.append(
                "the node runs with blocksonly: it estimates no fees and does not see transactions of other parties"
            )
        if full_rbf is False:
            shortcomings.append("the node replaces only transactions that signal it: start it with mempoolfullrbf=1")
        return Capabilities(
            software=network.subversion,
            version=network.version,
            full_rbf=full_rbf,
            truc=truc,
            relays=network.localrelay,
            pruned_below=info.pruneheight,
            mempool_bytes=mempool.maxmempool,
            shortcomings=tuple(shortcomings),
        )

    async def need_blocks(self, since: UnixTime) -> None:
        """Check that the node still has the blocks for a rescan since a time.

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
                "(Unix time). Set chain.url to a node that has them, or use the wallet that followed these channels"
            )
            raise ChainUnfit(msg)
