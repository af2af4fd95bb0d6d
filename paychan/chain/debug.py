"""The chain of debug mode: funding is computed from key and expiry, a broadcast only records spends (RBPCP §10.2).

For trials without a Bitcoin network; the configuration refuses it on every network but "test".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from bitcoin.core import CTransaction

from paychan.chain.base import Capabilities, Funding, Payee, Spend, Tip
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.fees import ChainFees
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.types import OutPoint, Sat, UnixTime

_CONFIRMATIONS = 1000
"""More than any configuration requires."""


class DebugChain:
    """Accepts every computed funding output, and confirms each broadcast at once."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._spends: dict[OutPoint, Spend] = {}
        self._published: dict[bytes, bytes] = {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    async def check(self) -> None:
        """There is no node to check."""

    async def tip(self) -> Tip:
        now = UnixTime(int(self._clock()))
        return Tip(height=0, block_hash="0" * 64, time=now, median_time=now)

    async def wait_for_change(self, seen: Tip, timeout_seconds: float) -> None:  # noqa: ARG002 - nothing changes here
        await asyncio.sleep(timeout_seconds)

    async def watch(self, payees: Collection[Payee], since: UnixTime | None = None) -> None:
        """Funding is computed, not followed."""

    def expect(self, payee: Payee) -> None:
        """Funding is computed, not waited for."""

    async def adopt(self, payee: Payee, outpoints: Collection[OutPoint]) -> None:
        """Funding is computed, not followed."""

    async def funding(self, payee: Payee, at: OutPoint | None = None) -> tuple[Funding, ...]:
        """One output for a channel; a reserve has none."""
        if not isinstance(payee, ChannelTerms):
            return ()
        only = debug_outpoint(payee.client_key, payee.expiry.unix_time)
        return (_believed(only),) if at in (None, only) else ()

    async def deposits(self, payees: Collection[Payee]) -> list[tuple[Payee, Funding]]:  # noqa: ARG002 - there are none
        return []

    async def unspent(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Funding]:
        return {outpoint: _believed(outpoint) for outpoint in outpoints if outpoint not in self._spends}

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        return self._spends.get(outpoint)

    async def transaction(self, txid: bytes) -> bytes:
        """Return a broadcast transaction, else b"": funding has no transaction, and no signer in debug mode needs it."""
        return self._published.get(txid, b"")

    async def funding_transaction(self, outpoint: OutPoint) -> bytes:  # noqa: ARG002 - see `transaction`
        return b""

    async def holds(self, seen: Tip) -> bool:  # noqa: ARG002 - there are no blocks to reorganize
        return True

    async def fees(self) -> ChainFees:
        return ChainFees()

    async def replacement_cost(self, txid: bytes) -> Sat | None:  # noqa: ARG002 - every broadcast is confirmed at once
        return None

    async def publish(self, transaction: bytes, child: bytes = b"") -> None:
        for raw in filter(None, (transaction, child)):
            parsed = CTransaction.deserialize(raw)
            self._published[bytes(parsed.GetTxid())] = raw
            for txin in parsed.vin:
                spent = OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n))
                self._spends.setdefault(spent, Spend(bytes(parsed.GetTxid()), _CONFIRMATIONS))

    async def close(self) -> None:
        self._spends.clear()
        self._published.clear()


def _believed(outpoint: OutPoint) -> Funding:
    return Funding(outpoint, DEBUG_FUNDING_SAT, _CONFIRMATIONS)
