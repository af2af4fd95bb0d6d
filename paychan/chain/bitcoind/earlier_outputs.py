"""Finds outputs that were paid to a channel's address before its opening, besides the ones that it was opened with.

A second or an early deposit belongs to the payer, and only the payer's refund can spend it; but the operator should see
it. The wallet knows only the last hours of a newly adopted address, so an occasional scan for all such addresses finds
the older outputs.
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
"""Pause between two scans: a scan keeps a node's disk busy for a minute or two."""


class Completing:
    """Runs from the first adoption until the chain is closed."""

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
        """Scan from time to time until `close`."""
        if self._task is None or not self._task.running:
            self._task = self._supervisor.run("deposits", self._scan_forever, patience_seconds=LONG_SECONDS)

    def hurry(self) -> None:
        """Start the next scan now, because its result is needed, such as the coins of the reserve."""
        self._hurry.set()

    async def close(self) -> None:
        if self._task is not None:
            await self._task.stop()

    async def look(self) -> None:
        """Add all outputs of all adopted addresses to the wallet.

        Raises `ChainFailed`: no address is marked, scan again.
        """
        addresses = await self._wallet.unsearched()
        entries = [self._scripts.entry(decode_address(each, self._network).hex()) for each in addresses]
        await asyncio.gather(*(self._search.complete(entry, LONG_SECONDS) for entry in entries))
        for entry in entries:
            for outpoint in entry.outpoints:
                with suppress(ChainFailed):  # spent meanwhile, or in a pruned block
                    await self._wallet.learn(outpoint)
        await self._wallet.mark_complete(addresses)

    async def _scan_forever(self, task: Supervised) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await self._hurry.wait()
            self._hurry.clear()
            with suppress(ChainFailed):
                await self.look()
            task.succeeded()
