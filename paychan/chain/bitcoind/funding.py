"""Payments to scripts, read from a bitcoind: scripts of unopened channels, and those of opened channels.

The node stores nothing about the first kind (`arrivals`, `utxo_scan`, `sought_scripts`), and concurrent calls share one
request (`shared_call`). The watch-only wallet follows the second kind from the adoption on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from decimal import Decimal

import msgspec
from msgspec import Struct

from paychan.chain.base import ChainFailed, Funding, Payee
from paychan.chain.bitcoind.arrivals import Arrivals
from paychan.chain.bitcoind.earlier_outputs import Completing
from paychan.chain.bitcoind.rpc import JsonRpc
from paychan.chain.bitcoind.shared_call import SharedCall
from paychan.chain.bitcoind.sought_scripts import MOST_OUTPUTS, SoughtScripts
from paychan.chain.bitcoind.utxo_scan import FundingSearch
from paychan.chain.bitcoind.wallet import WatchWallet
from paychan.protocol.types import Network, OutPoint, Sat
from paychan.supervisor import Supervisor

_ADOPTION_SECONDS = 30.0
"""A node that rescans old blocks accepts no import meanwhile; an opening must not wait for that."""

_SAT_PER_COIN = 100_000_000


class _Script(Struct, frozen=True):
    hex: str


class TxOut(Struct, frozen=True, rename={"script": "scriptPubKey"}):
    """An unspent output, as validated by the node."""

    confirmations: int
    value: Decimal
    script: _Script
    coinbase: bool


_tx_out: msgspec.json.Decoder[TxOut | None] = msgspec.json.Decoder(TxOut | None)


class NodeFunding:
    """Outputs by script, from the node behind `rpc`; `wallet` follows the scripts of opened channels."""

    def __init__(
        self, rpc: JsonRpc, wallet: WatchWallet, network: Network, search_seconds: float, supervisor: Supervisor
    ) -> None:
        self._rpc, self._wallet = rpc, wallet
        self._network = network
        self._search_seconds = search_seconds
        self.scripts = SoughtScripts()
        self.search = FundingSearch(rpc, supervisor)
        self.completing = Completing(wallet, self.scripts, self.search, network, supervisor)
        self._arrivals = Arrivals(rpc, self.scripts, supervisor)
        self._tx_outs: SharedCall[OutPoint, TxOut] = SharedCall(lambda outpoints: unspent_outputs(rpc, outpoints))
        self._followed: SharedCall[str, bool] = SharedCall(self._ask_followed)

    def begin(self) -> None:
        """Search from time to time for outputs that channels' addresses received before their openings."""
        self.completing.begin()

    def complete_soon(self) -> None:
        """Start that search at once."""
        self.completing.begin()
        self.completing.hurry()

    async def close(self) -> None:
        """Stop all tasks."""
        for part in (self.search, self._arrivals, self.completing, self._tx_outs, self._followed):
            await part.close()

    def expect(self, payee: Payee) -> None:
        """Search new blocks and transactions for a script; keeps it only in memory."""
        self.scripts.entry(payee.funding_script.hex())
        self._arrivals.begin()

    async def funding(self, payee: Payee, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """List the unspent outputs that pay exactly to this script, the most valuable first, up to 100.

        `at` names the only wanted output: that is one request. Otherwise a script that is not watched is sought from
        now on, in memory. If no payment to it was seen arriving, the node also scans its unspent outputs for earlier
        ones.

        Raises:
            ChainFailed: also while that scan runs; call again.
        """
        if at is not None:
            return await self._paying(payee, [at])
        address = payee.funding_address(self._network)
        if not await self._followed.answers([address]):
            return await self._seek(payee)
        known = await self._wallet.received(address)
        if await self._wallet.unsearched(address):
            sought = self.scripts.entry(payee.funding_script.hex())
            if not sought.is_complete:
                await self.search.complete(sought, self._search_seconds)
            known += sought.outpoints
        return await self._paying(payee, known)

    async def deposits(self, payees: Collection[Payee]) -> list[tuple[Payee, Funding]]:
        """List the unspent outputs that pay to these followed scripts, with one request for all."""
        by_script = {payee.funding_script.hex(): payee for payee in payees}
        if not by_script:
            return []
        addresses = [payee.funding_address(self._network) for payee in by_script.values()]
        found = await unspent_outputs(self._rpc, await self._wallet.received(*addresses))
        return [
            (by_script[tx_out.script.hex], as_funding(outpoint, tx_out))
            for outpoint, tx_out in found.items()
            if tx_out.script.hex in by_script
        ]

    async def _seek(self, payee: Payee) -> tuple[Funding, ...]:
        sought = self.scripts.entry(payee.funding_script.hex())
        found = await self._paying(payee, sought.outpoints)
        if found:
            return found
        await self._arrivals.look()
        found = await self._paying(payee, sought.outpoints)
        if not found and not sought.is_complete:
            await self.search.complete(sought, self._search_seconds)
            found = await self._paying(payee, sought.outpoints)
        self._arrivals.begin()
        return found

    async def _paying(self, payee: Payee, outpoints: Collection[OutPoint]) -> tuple[Funding, ...]:
        """Return those of these outputs that are unspent and pay to the script."""
        script = payee.funding_script.hex()
        found = (await self._tx_outs.answers(outpoints)).items()
        fundings = [as_funding(outpoint, tx_out) for outpoint, tx_out in found if tx_out.script.hex == script]
        return tuple(sorted(fundings, key=lambda funding: funding.value_sat, reverse=True)[:MOST_OUTPUTS])

    async def adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:
        """Follow a script permanently, and add the outputs that already pay to it to the wallet.

        Raises:
            ChainFailed: an output is spent, was just reorganized away, or is in a block that the node has pruned.
        """
        try:
            async with asyncio.timeout(_ADOPTION_SECONDS):
                await self._adopt(payee, outpoints)
        except TimeoutError:
            msg = "the node is busy with its blocks; try again"
            raise ChainFailed(msg) from None

    async def _adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:
        address = payee.funding_address(self._network)
        is_new = bool(await self._wallet.incomplete([address]))
        if is_new:
            await self._wallet.follow([address])
        for outpoint in outpoints:
            await self._wallet.learn(outpoint)
        if len(await self._paying(payee, outpoints)) < len(outpoints):
            msg = f"the payments to {address} are changing; try again"
            raise ChainFailed(msg)
        if is_new:
            await self._wallet.mark_adopted(address)
            self.completing.begin()
        self.scripts.drop(payee.funding_script.hex())

    async def find_all(self, payee: Payee) -> tuple[Funding, ...]:
        """List all unspent outputs that pay to this script, and follow it permanently; for a payer's own script.

        At the first call the node scans its unspent outputs, even if payments were seen arriving.
        """
        address = payee.funding_address(self._network)
        if not await self._wallet.incomplete([address]):
            return await self._paying(payee, await self._wallet.received(address))
        sought = self.scripts.entry(payee.funding_script.hex())
        await self.search.complete(sought, self._search_seconds)
        found = await self._paying(payee, sought.outpoints)
        try:
            await self.adopt(payee, [funding.outpoint for funding in found])
            await self._wallet.mark_complete([address])
        except ChainFailed:  # such as for a pruned block: the outputs exist, and the next call scans again
            return found
        return await self._paying(payee, await self._wallet.received(address))

    async def _ask_followed(self, addresses: Collection[str]) -> dict[str, bool]:
        incomplete = set(await self._wallet.incomplete(addresses))
        return {address: True for address in addresses if address not in incomplete}


async def unspent_outputs(rpc: JsonRpc, outpoints: Collection[OutPoint]) -> dict[OutPoint, TxOut]:
    """Return those of these outputs that are unspent, in the chain and in the mempool."""
    wanted = list(outpoints)
    calls = [[outpoint.txid_hex, outpoint.vout, True] for outpoint in wanted]
    found = await rpc.batch(_tx_out, "gettxout", calls)
    return {outpoint: tx_out for outpoint, tx_out in zip(wanted, found, strict=True) if tx_out is not None}


def as_funding(outpoint: OutPoint, tx_out: TxOut) -> Funding:
    """Convert an output to the chain contract's type."""
    return Funding(outpoint, Sat(int(tx_out.value * _SAT_PER_COIN)), tx_out.confirmations, tx_out.coinbase)
