"""Shows the signer the newest payments now and then, so that what it knows is older than a break-in.

Who takes over the server can collude with a client and have an old payment settled, such as the opening one, unless the
signer has seen a newer one. So every few minutes it is shown what has grown since: one batch at a time, with a pause
between them. It reads the store, page by page; nothing of it is on the way of a payment, and a signer or a node that
is away only means that the next round shows more. A signer that refuses a payment as older than it knows tells that
our store was restored from a backup: that is logged as an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from actors.context import Context
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import State
from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat
from paychan.signer_client.base import SignerAbsent, SignerRefused, show

BATCH = 100
"""Channels read at a time, and most claims in one message: some 30 milliseconds of the signer's time."""

_PAUSE_SECONDS = 0.2
"""Between two pages, so that payments and settlements come first: 10,000 channels take 20 seconds and more."""

_FUNDINGS_AT_A_ROUND = 1_000
"""Funding transactions fetched from the node in one round."""

log = structlog.get_logger("showing")


class Task(Protocol):
    """What supervises the task: `paychan.supervisor.Supervised`."""

    def succeeded(self) -> None:
        """Note that the work was done once."""


class Showing:
    """Remembers which payment of which channel was shown; after a restart all are shown once more."""

    def __init__(self, context: Context, interval_seconds: float, pause_seconds: float = _PAUSE_SECONDS) -> None:
        self._context = context
        self._interval_seconds = interval_seconds
        self._pause_seconds = pause_seconds
        self._shown: dict[OutPoint, Sat] = {}
        """Change value by outpoint, of channels that were open in the last round."""
        self._fundings_left = 0

    async def run(self, task: Task) -> None:
        """Show for ever."""
        while True:
            try:
                await self.round()
                task.succeeded()
            except SignerAbsent as error:
                log.info("payments not shown to the signer yet", reason=str(error))
            except SignerRefused as error:
                log.warning("the signer takes no payments to remember", reason=str(error))
            await asyncio.sleep(self._interval_seconds)

    async def round(self) -> None:
        """Show all that has grown. Raises what the store raises, `SignerAbsent` and `SignerRefused`."""
        self._fundings_left = _FUNDINGS_AT_A_ROUND
        seen: set[OutPoint] = set()
        after = None
        while page := await self._context.store.scan(State.OPEN, after=after, limit=BATCH):
            claims = [channel.claim for channel in page]
            seen |= {claim.outpoint for claim in claims}
            grown = [claim for claim in claims if self._shown.get(claim.outpoint) != claim.payment.change_sat]
            if grown:
                await self._show(grown)
            after = (page[-1].terms.expiry, page[-1].outpoint)
            await asyncio.sleep(self._pause_seconds)
        self._shown = {outpoint: sat for outpoint, sat in self._shown.items() if outpoint in seen}

    async def _show(self, claims: Sequence[Claim]) -> None:
        """Show a batch; for what the signer has not seen the funding of, show that first."""
        unshown = await self._remember(claims)
        ready = [claim for claim in unshown if await self._show_funding(claim.outpoint)]
        if ready:
            await self._remember(ready)

    async def _remember(self, claims: Sequence[Claim]) -> list[Claim]:
        """Have the signer remember payments; return those that it wants to see the funding of."""
        reply = await self._context.signer.show_newest(claims)
        refused = [claims[index] for index in reply.refused if index < len(claims)]
        unshown = [claims[index] for index in reply.unshown if index < len(claims)]
        if refused:
            outpoints = [str(claim.outpoint) for claim in refused]
            log.error(
                "the signer knows newer payments, or none of these channels",
                channels=outpoints[:10],
                count=len(refused),
            )
        waiting = {claim.outpoint for claim in unshown}
        self._shown |= {claim.outpoint: claim.payment.change_sat for claim in claims if claim.outpoint not in waiting}
        return unshown

    async def _show_funding(self, outpoint: OutPoint) -> bool:
        """Show one funding transaction, if the node has it; a node that has not, or is away, stops no other channel."""
        if not self._fundings_left:
            return False
        self._fundings_left -= 1
        try:
            await show(self._context.signer, [outpoint], self._context.chain.transaction)
        except (ChainFailed, SignerRefused) as error:
            log.debug("funding not shown to the signer", channel=str(outpoint), reason=str(error))
            return False
        return True
