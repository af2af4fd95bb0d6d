"""Finds what was paid to the address of a channel before the channel was opened, beside what it was opened with.

A second or a short deposit is the payer's, and only its refund can move it; but the operator should know of it. Of an address
that was just adopted the wallet knows the newest hours, so one scan for all of them now and then finds what is older.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from paychan.chain.base import ChainFailed
from paychan.chain.bitcoind.sought_scripts import SoughtScripts
from paychan.chain.bitcoind.utxo_scan import FundingSearch
from paychan.chain.bitcoind.wallet import LONG_SECONDS, WatchWallet
from paychan.protocol.address import decode_address
from paychan.protocol.types import Network
from paychan.supervisor import Supervised, Supervisor

_PAUSE_SECONDS = 3600.0
"""Between two looks: a scan keeps a node's disk busy for a minute or two."""


class Completing:
    """Goes on for as long as the chain is used, from the first adoption on."""

    def __init__(
        self,
        wallet: WatchWallet,
        scripts: SoughtScripts,
        search: FundingSearch,
        network: Network,
        supervisor: Supervisor,
    ) -> None:
        self._wallet, self._scripts, self._search = wallet, scripts, search
        self._network = network
        self._supervisor = supervisor
        self._task: Supervised | None = None
        self._hurry = asyncio.Event()

    def begin(self) -> None:
        """Look now and then, until `close`."""
        if self._task is None or not self._task.running:
            self._task = self._supervisor.run("deposits", self._look_for_ever, patience_seconds=LONG_SECONDS)

    def hurry(self) -> None:
        """Make the next look now: what was found is needed, as coins of the reserve are."""
        self._hurry.set()

    async def close(self) -> None:
        if self._task is not None:
            await self._task.stop()

    async def look(self) -> None:
        """Let the wallet know what all adopted addresses hold. Raises `ChainFailed`: nothing is marked, look again."""
        addresses = await self._wallet.unsearched()
        entries = [self._scripts.entry(decode_address(each, self._network).hex()) for each in addresses]
        await asyncio.gather(*(self._search.complete(entry, LONG_SECONDS) for entry in entries))
        for entry in entries:
            for outpoint in entry.outpoints:
                with suppress(ChainFailed):  # spent meanwhile, or in a block that was pruned
                    await self._wallet.learn(outpoint)
        await self._wallet.mark_complete(addresses)

    async def _look_for_ever(self, task: Supervised) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await self._hurry.wait()
            self._hurry.clear()
            with suppress(ChainFailed):
                await self.look()
            task.succeeded()
