"""The chain of debug mode: funding follows from key and expiry, publishing only notes what was spent (PROTOCOL §10.2).

For trying things out without a Bitcoin network; the configuration refuses it anywhere but on "test".
"""

from __future__ import annotations

import hashlib
import time

from bitcoin.core import CTransaction

from paychan.chain.base import Funding, Spend, Tip
from paychan.protocol.debugfunding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.scripts import ChannelTerms
from paychan.protocol.types import OutPoint, UnixTime

_CONFIRMATIONS = 1000
"""More than any configuration asks for."""


class DebugChain:
    """Believes every funding output, and confirms at once what is published."""

    def __init__(self) -> None:
        self._spends: dict[OutPoint, Spend] = {}

    async def funding(self, terms: ChannelTerms) -> tuple[Funding, ...]:
        outpoint = debug_outpoint(terms.client_key, terms.expiry)
        return (Funding(outpoint, DEBUG_FUNDING_SAT, _CONFIRMATIONS),)

    async def tip(self) -> Tip:
        now = int(time.time())
        return Tip(height=0, block_hash=hashlib.sha256(str(now).encode()).hexdigest(), median_time=UnixTime(now))

    async def fee_rate(self) -> int | None:
        return None

    async def publish(self, transaction: bytes) -> None:
        parsed = CTransaction.deserialize(transaction)
        for txin in parsed.vin:
            spent = OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n))
            self._spends.setdefault(spent, Spend(bytes(parsed.GetTxid()), _CONFIRMATIONS))

    async def spender(self, outpoint: OutPoint) -> Spend | None:
        return self._spends.get(outpoint)

    async def close(self) -> None:
        self._spends.clear()
