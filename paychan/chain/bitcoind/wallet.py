"""A watch-only wallet inside the operator's bitcoind: the node's own record of the server's scripts and their spends.

It holds one `addr(…)` descriptor per channel and no key. The node keeps it across restarts of both programs, catches up
on blocks that it missed, and needs no index, so it works on a pruned node. Measured: 10,000 channels cost the node
about 200 MB of memory, 3 to 10 ms for each import, and 0.2 s for listing all their transactions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from paychan.chain.base import ChainFailed, ChainUnfit, Spend
from paychan.chain.bitcoind.long_call import LongCall
from paychan.chain.bitcoind.rpc import METHOD_NOT_FOUND, JsonRpc, RpcError
from paychan.protocol.types import OutPoint

LONG_SECONDS = 4 * 3600.0
"""Limit for a rescan of blocks (up to a second each), and for one scan of all unspent outputs (a minute or two)."""

_COMPLETE = "paychan"
"""Label of an address whose outputs the wallet knows completely.

A label also keeps an address from counting as change.
"""
_INCOMPLETE = "paychan search"
"""Label of a followed address whose older outputs the wallet may not know yet."""

_ADOPTED = "paychan adopted"
"""Label of a followed address with the outputs that its channel was opened with; older outputs may be missing."""

_NO_SUCH_LABEL = -11
"""Bitcoin Core, rpc/protocol.h: RPC_WALLET_INVALID_LABEL_NAME"""

_WALLET_NOT_FOUND = -18
"""Bitcoin Core, rpc/protocol.h: RPC_WALLET_NOT_FOUND"""
_WALLET_ERROR = -4
"""RPC_WALLET_ERROR"""
_MISC_ERROR = -1
"""RPC_MISC_ERROR: for example, a node with -nosettings can't record that it shall load a wallet at its start."""
NOT_FOUND = -5
"""RPC_INVALID_ADDRESS_OR_KEY: no such block, no such transaction"""


_T = TypeVar("_T")


class _WalletInfo(Struct, frozen=True):
    private_keys_enabled: bool
    descriptors: bool = True


class _Descriptor(Struct, frozen=True):
    descriptor: str


class _Address(Struct, frozen=True):
    labels: tuple[str, ...] = ()


class _Failure(Struct, frozen=True):
    message: str


class _Import(Struct, frozen=True):
    success: bool
    error: _Failure | None = None


class _Unspent(Struct, frozen=True):
    txid: str
    vout: int


class _Held(Struct, frozen=True):
    bestblock: str
    confirmations: int


class _Height(Struct, frozen=True):
    height: int


class _Entry(Struct, frozen=True):
    txid: str
    category: str


class _Listing(Struct, frozen=True):
    transactions: tuple[_Entry, ...]
    lastblock: str


class _Input(Struct, frozen=True):
    txid: str = ""  # a coinbase input has neither
    vout: int = 0


class _Decoded(Struct, frozen=True):
    vin: tuple[_Input, ...]


class _Transaction(Struct, frozen=True):
    txid: str
    confirmations: int
    """0 while unconfirmed, also outside of the mempool; negative if a conflicting transaction is confirmed."""
    decoded: _Decoded
    hex: str


_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_held: msgspec.json.Decoder[_Held | None] = msgspec.json.Decoder(_Held | None)
_height: msgspec.json.Decoder[_Height] = msgspec.json.Decoder(_Height)
_anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Any)
_names: msgspec.json.Decoder[list[str]] = msgspec.json.Decoder(list[str])
_wallet_info: msgspec.json.Decoder[_WalletInfo] = msgspec.json.Decoder(_WalletInfo)
_descriptor: msgspec.json.Decoder[_Descriptor] = msgspec.json.Decoder(_Descriptor)
_by_address: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])
_address: msgspec.json.Decoder[_Address] = msgspec.json.Decoder(_Address)
_imports: msgspec.json.Decoder[list[_Import]] = msgspec.json.Decoder(list[_Import])
_unspents: msgspec.json.Decoder[list[_Unspent]] = msgspec.json.Decoder(list[_Unspent])
_listing: msgspec.json.Decoder[_Listing] = msgspec.json.Decoder(_Listing)
_transaction: msgspec.json.Decoder[_Transaction] = msgspec.json.Decoder(_Transaction)


class WatchWallet:
    """The wallet `name` of the node behind `rpc`: addresses in, outpoints and spending transactions out."""

    def __init__(self, rpc: JsonRpc, name: str, patience_seconds: float = 10.0) -> None:
        self._rpc = rpc
        self._name = name
        self.made = 0
        """Number of times the wallet was created: each time it knows nothing of the addresses followed before."""
        self._opening = LongCall(f'the node is loading its wallet "{name}"', patience_seconds)
        self._importing = asyncio.Lock()  # the node refuses a second import during a rescan
        self._reading = asyncio.Lock()
        self._spenders: dict[OutPoint, list[str]] = {}
        self._read: set[str] = set()
        self._listed_to = ""

    async def open(self) -> None:
        """Load the wallet, or create it: at the first time, or after it was lost.

        Loading includes the blocks that the wallet missed, which may take long; it continues after this call has
        failed.

        Raises:
            ChainUnfit: the node has no wallet support or can't load this wallet, or the wallet holds keys.
            ChainFailed: the node is still loading it; call again.
        """
        await self._opening.run(self._open)

    async def close(self) -> None:
        await self._opening.close()

    async def _open(self) -> None:
        try:
            if self._name not in await self._rpc.call(_names, "listwallets"):
                await self._load_or_create()
            info = await self._rpc.call(_wallet_info, "getwalletinfo", wallet=self._name)
        except RpcError as error:
            raise ChainUnfit(self._mend(error)) from error
        if info.private_keys_enabled or not info.descriptors:
            msg = f'the node\'s wallet "{self._name}" belongs to another user. Set chain.wallet to another name'
            raise ChainUnfit(msg)

    async def _load_or_create(self) -> None:
        """Load or create the wallet, and let the node load it at each start if it can; else error -18 leads here."""
        try:
            await self._have_loaded("loadwallet", self._name)
        except RpcError as error:
            if error.code != _WALLET_NOT_FOUND:
                raise
            # no private keys, blank, no passphrase, no rule on reuse, descriptors
            await self._have_loaded("createwallet", self._name, True, True, "", False, True)
            self.made += 1
            self._forget()

    async def _have_loaded(self, method: str, *params: Any) -> None:
        load_on_startup = True
        try:
            await self._rpc.call(_anything, method, *params, load_on_startup, timeout_seconds=LONG_SECONDS)
        except RpcError as error:
            if error.code != _MISC_ERROR:
                raise
            if self._name not in await self._rpc.call(_names, "listwallets"):
                await self._rpc.call(_anything, method, *params, timeout_seconds=LONG_SECONDS)

    async def _call(
        self, decoder: msgspec.json.Decoder[_T], method: str, *params: Any, timeout_seconds: float | None = None
    ) -> _T:
        """Call the wallet. If the node does not have it loaded, load or create it, and call again once."""
        try:
            return await self._rpc.call(decoder, method, *params, wallet=self._name, timeout_seconds=timeout_seconds)
        except RpcError as error:
            if error.code != _WALLET_NOT_FOUND:
                raise
        await self.open()
        return await self._rpc.call(decoder, method, *params, wallet=self._name, timeout_seconds=timeout_seconds)

    async def _batch(self, decoder: msgspec.json.Decoder[_T], method: str, params: Sequence[Sequence[Any]]) -> list[_T]:
        """Do the same for many calls of one method."""
        try:
            return await self._rpc.batch(decoder, method, params, self._name)
        except RpcError as error:
            if error.code != _WALLET_NOT_FOUND:
                raise
        await self.open()
        return await self._rpc.batch(decoder, method, params, self._name)

    def _forget(self) -> None:
        self._spenders.clear()
        self._read.clear()
        self._listed_to = ""

    def _mend(self, error: RpcError) -> str:
        if error.code == METHOD_NOT_FOUND:
            return "the node runs without wallet support. Remove disablewallet from its configuration"
        if error.code == _WALLET_ERROR:
            return (
                f'the node can\'t load its wallet "{self._name}": {error.reason}. If it has pruned blocks that the '
                "wallet has not seen, set chain.wallet to a new name, and let the node keep more blocks from now on"
            )
        return f"the node's wallet \"{self._name}\" can't be used: {error.reason}"

    async def incomplete(self, addresses: Collection[str]) -> list[str]:
        """Return the addresses that are not followed, or whose relevant outputs the wallet may not know."""
        wanted = list(addresses)
        infos = await self._batch(_address, "getaddressinfo", [[each] for each in wanted])
        return [
            each
            for each, info in zip(wanted, infos, strict=True)
            if not {_COMPLETE, _ADOPTED}.intersection(info.labels)
        ]

    async def unsearched(self, address: str = "") -> list[str]:
        """Return the adopted addresses, or this one if it is adopted, that may have earlier outputs."""
        if address:
            labels = (await self._call(_address, "getaddressinfo", address)).labels
            return [address] if _ADOPTED in labels else []
        try:
            found = await self._call(_by_address, "getaddressesbylabel", _ADOPTED)
        except RpcError as error:
            if error.code != _NO_SUCH_LABEL:
                raise
            return []
        return list(found)

    async def descriptors(self, addresses: Sequence[str]) -> list[str]:
        """Convert addresses to output descriptors (BIP385), with the node's checksums."""
        calls = [[f"addr({each})"] for each in addresses]
        return [each.descriptor for each in await self._rpc.batch(_descriptor, "getdescriptorinfo", calls)]

    async def follow(self, addresses: Sequence[str]) -> None:
        """Follow addresses from now on.

        Each time, the node scans its mempool and the blocks of the last two or three hours. The addresses count as
        incomplete until `mark_complete`, so work that a crash interrupts is repeated.
        """
        if not addresses:
            return
        requests = [
            {"desc": descriptor, "timestamp": "now", "label": _INCOMPLETE}
            for descriptor in await self.descriptors(addresses)
        ]
        async with self._importing:
            results = await self._call(_imports, "importdescriptors", requests, timeout_seconds=LONG_SECONDS)
        failed = next((result for result in results if not result.success), None)
        if failed is not None:
            msg = f"the node's wallet refuses to follow: {failed.error.message if failed.error else 'no reason given'}"
            raise ChainFailed(msg)

    async def rescan(self, first: int, last: int) -> None:
        """Let the node scan its blocks of these heights for followed addresses."""
        async with self._importing:
            await self._call(_anything, "rescanblockchain", first, last, timeout_seconds=LONG_SECONDS)
        async with self._reading:
            self._listed_to = ""  # the found transactions are older than the last listing

    async def mark_complete(self, addresses: Sequence[str]) -> None:
        """Record that the wallet knows all outputs of these followed addresses."""
        await self._batch(_anything, "setlabel", [[each, _COMPLETE] for each in addresses])

    async def mark_adopted(self, *addresses: str) -> None:
        """Record that the wallet knows the relevant outputs of these followed addresses, but not all earlier ones."""
        await self._batch(_anything, "setlabel", [[each, _ADOPTED] for each in addresses])

    async def learn(self, outpoint: OutPoint) -> None:
        """Add an unspent output of a followed address to the wallet, without a rescan.

        Without its transaction the wallet would not notice its spend. The wallet saw unconfirmed transactions in the
        mempool.

        Raises:
            ChainFailed: the output is spent, was just reorganized away, or is in a block that the node has pruned.
        """
        try:
            await self.transaction(outpoint.txid)
        except RpcError as error:
            if error.code != NOT_FOUND:
                raise
        else:
            return
        try:
            await self._add(outpoint)
        except RpcError as error:
            msg = f"can't read the transaction of {outpoint} (pruned, or just reorganized away): {error}"
            raise ChainFailed(msg) from error

    async def _add(self, outpoint: OutPoint) -> None:
        raw, block_hash = await self.read_unspent(outpoint)
        if not block_hash:
            msg = f"{outpoint} has just arrived; try again"
            raise ChainFailed(msg)
        proof = await self._rpc.call(_text, "gettxoutproof", [outpoint.txid_hex], block_hash)
        await self._call(_anything, "importprunedfunds", raw, proof)

    async def read_unspent(self, outpoint: OutPoint) -> tuple[str, str]:
        """Return the transaction of an unspent output (hex), and the hash of its block; "" while it is in the mempool.

        Raises:
            ChainFailed: the output is spent, was just reorganized away, or is in a block that the node has pruned.
        """
        txid = outpoint.txid_hex
        held = await self._rpc.call(_held, "gettxout", txid, outpoint.vout, True)
        if held is None:
            msg = f"{outpoint} is spent; try again"
            raise ChainFailed(msg)
        if not held.confirmations:
            return await self._rpc.call(_text, "getrawtransaction", txid, False), ""
        height = (await self._rpc.call(_height, "getblockheader", held.bestblock)).height - held.confirmations + 1
        block_hash = await self._rpc.call(_text, "getblockhash", height)
        return await self._rpc.call(_text, "getrawtransaction", txid, False, block_hash), block_hash

    async def received(self, *addresses: str) -> list[OutPoint]:
        """List unspent outputs of followed addresses, including unconfirmed, unsafe and immature ones."""
        options = {"include_immature_coinbase": True}
        least, most = 0, 9_999_999  # confirmations
        found = await self._call(_unspents, "listunspent", least, most, addresses, True, options)
        return [OutPoint.parse(each.txid, each.vout) for each in found]

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        """Return the confirmed transaction that spends an output of a followed address."""
        async with self._reading:
            try:
                return await self._look_up(outpoint)
            except RpcError as error:
                if error.code != NOT_FOUND:
                    raise
            # a node that was killed forgets its newest blocks, and a newly installed node has no wallet
            self._forget()
            return await self._look_up(outpoint)

    async def transaction(self, txid: bytes) -> bytes:
        """Return, serialized, a transaction (internal txid) that spends from a followed address."""
        (found,) = await self._transactions([OutPoint(txid, 0).txid_hex])
        return bytes.fromhex(found.hex)

    async def _look_up(self, outpoint: OutPoint) -> Spend | None:
        await self._read_news()
        for transaction in await self._transactions(self._spenders.get(outpoint, [])):
            if transaction.confirmations > 0:
                return Spend(OutPoint.parse(transaction.txid, 0).txid, transaction.confirmations)
        return None

    async def _read_news(self) -> None:
        """Record which outputs the wallet's new transactions spend. The depth is not recorded, but read at each call.

        The node lists only transactions since the last listed block, or since the fork if that block was reorganized
        away, and the unconfirmed ones.
        """
        watch_only, removed, change = True, False, True
        listing = await self._call(_listing, "listsinceblock", self._listed_to, 1, watch_only, removed, change)
        new = {entry.txid for entry in listing.transactions if entry.category == "send"} - self._read
        for transaction in await self._transactions(sorted(new)):
            for txin in transaction.decoded.vin:
                self._spenders.setdefault(OutPoint.parse(txin.txid, txin.vout), []).append(transaction.txid)
            self._read.add(transaction.txid)
        self._listed_to = listing.lastblock

    async def _transactions(self, txids: Sequence[str]) -> list[_Transaction]:
        watch_only, verbose = True, True
        calls = [[txid, watch_only, verbose] for txid in txids]
        return await self._batch(_transaction, "gettransaction", calls)
