"""Finds outputs older than the search for their script, by a scan of all unspent outputs. Leaves no state in the node.

Without an index, only `scantxoutset` finds these. A scan takes a minute or two on the main network, for any number of
scripts, and the node runs one at a time. So all waiting callers share the next scan, no caller waits longer than its
patience, and each script is scanned for once; later payments are seen by `arrivals`. Each scan is followed by a pause
of its own length.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from decimal import Decimal
from time import monotonic

import msgspec
from msgspec import Struct

from paychan.chain.base import ChainFailed
from paychan.chain.bitcoind.rpc import JsonRpc
from paychan.chain.bitcoind.sought_scripts import MOST_OUTPUTS, Sought
from paychan.chain.bitcoind.wallet import LONG_SECONDS
from paychan.protocol.types import OutPoint
from paychan.supervisor import Supervised, Supervisor

MOST_WAITING = 10_000
"""Most scripts that wait for a scan; further ones are refused."""

_LONGEST_PAUSE_SECONDS = 120.0


class _Unspent(Struct, frozen=True, rename={"script": "scriptPubKey"}):
    txid: str
    vout: int
    script: str
    amount: Decimal


class _Scan(Struct, frozen=True):
    success: bool
    unspents: tuple[_Unspent, ...] = ()


_scan: msgspec.json.Decoder[_Scan] = msgspec.json.Decoder(_Scan)

_Outcome = asyncio.Future[ChainFailed | None]


class FundingSearch:
    """Scripts that wait for a scan, and the task that scans."""

    def __init__(self, rpc: JsonRpc, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._rpc = rpc
        self._waiting: dict[str, tuple[Sought, _Outcome]] = {}
        self._task: Supervised | None = None

    async def complete(self, sought: Sought, patience_seconds: float) -> None:
        """Return when a scan has listed the existing outputs.

        Raises:
            ChainFailed: the scan failed, or takes longer than the patience; call again.
        """
        if len(self._waiting) >= MOST_WAITING and sought.script not in self._waiting:
            msg = f"{MOST_WAITING} scripts wait for a scan of the unspent outputs; try again later"
            raise ChainFailed(msg)
        new: _Outcome = asyncio.get_running_loop().create_future()
        outcome = self._waiting.setdefault(sought.script, (sought, new))[1]
        if self._task is None or not self._task.running:
            self._task = self._supervisor.run("funding search", self._run_queue, endless=False)
        await asyncio.wait([outcome], timeout=patience_seconds)
        failure = (
            outcome.result()
            if outcome.done()
            else ChainFailed("the node is still scanning its unspent outputs for this script; try again in a minute")
        )
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """Stop scanning. The node finishes a running scan; its answer is not read."""
        if self._task is not None:
            await self._task.stop()

    async def _run_queue(self, task: Supervised) -> None:
        while self._waiting:
            begun, batch = monotonic(), list(self._waiting.values())
            failure = None
            try:
                await self._find([sought for sought, _ in batch])
            except ChainFailed as error:
                failure = error
            else:
                task.succeeded()
            for sought, outcome in batch:
                del self._waiting[sought.script]
                outcome.set_result(failure)
            await asyncio.sleep(min(monotonic() - begun, _LONGEST_PAUSE_SECONDS))

    async def _find(self, batch: list[Sought]) -> None:
        """Scan for these scripts, and store the found outputs."""
        descriptors = [f"raw({sought.script})" for sought in batch]
        scan = await self._rpc.call(_scan, "scantxoutset", "start", descriptors, timeout_seconds=LONG_SECONDS)
        if not scan.success:
            msg = "the node aborted its scan of the unspent outputs; try again"
            raise ChainFailed(msg)
        found: dict[str, list[OutPoint]] = defaultdict(list)
        for unspent in sorted(scan.unspents, key=lambda unspent: unspent.amount, reverse=True):
            found[unspent.script].append(OutPoint.parse(unspent.txid, unspent.vout))
        for sought in batch:
            sought.add(found[sought.script][:MOST_OUTPUTS])
            sought.is_complete = True
