"""Shows the signer the newest payments at intervals, so that an intruder can't have an older payment settled.

An intruder on the server can collude with a client and have an old payment settled, such as the opening one, unless the
signer has seen a newer one. So every few minutes this task shows the signer the payments that have grown since: one
batch at a time, with a pause between batches. It reads the store page by page, and no payment waits for it. If the
signer or the node is away, the next round shows more. If the signer refuses a payment because it knows a newer one, the
server's store was restored from a backup; the task logs that as an error.
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
"""Channels read at a time, and the most claims in one message: some 30 milliseconds of the signer's time."""

_PAUSE_SECONDS = 0.2
"""Pause between two pages, so that payments and settlements come first: 10,000 channels take at least 20 seconds."""

_FUNDINGS_AT_A_ROUND = 1_000
"""Most funding transactions fetched from the node in one round."""

log = structlog.get_logger("showing")


class Task(Protocol):
    """The task's supervisor: `paychan.supervisor.Supervised`."""

    def succeeded(self) -> None:
        """Note that the work was done once."""


class Showing:
    """Shows payments, and remembers the newest shown one of each channel; after a restart all are shown once more."""

    def __init__(self, context: Context, interval_seconds: float, pause_seconds: float = _PAUSE_SECONDS) -> None:
        self._context = context
        self._interval_seconds = interval_seconds
        self._pause_seconds = pause_seconds
        self._shown: dict[OutPoint, Sat] = {}
        """Change value by outpoint, of channels that were open in the last round."""
        self._fundings_left = 0

    async def run(self, task: Task) -> None:
        """Show payments at intervals; ends only by cancellation or a failure of the store."""
        while True:
            try:
                asked = await self.round()
                task.succeeded()
                if asked:
                    self._context.observers.report_health("signer")
            except SignerAbsent as error:
                log.info("payments not shown to the signer yet", reason=str(error))
                self._context.observers.report_health("signer", str(error))
            except SignerRefused as error:
                log.warning("the signer refuses to store newest payments", reason=str(error))
            await asyncio.sleep(self._interval_seconds)

    async def round(self) -> bool:
        """Show all payments that have grown; return whether there were any, so that the signer was asked.

        Raises `SignerAbsent`, `SignerRefused`, and the errors of the store.
        """
        asked = False
        self._fundings_left = _FUNDINGS_AT_A_ROUND
        seen: set[OutPoint] = set()
        after = None
        while page := await self._context.store.scan(State.OPEN, after=after, limit=BATCH):
            claims = [channel.claim for channel in page]
            seen |= {claim.outpoint for claim in claims}
            grown = [claim for claim in claims if self._shown.get(claim.outpoint) != claim.payment.change_sat]
            if grown:
                await self._show(grown)
                asked = True
            after = (page[-1].terms.expiry.lock_time, page[-1].outpoint)
            await asyncio.sleep(self._pause_seconds)
        self._shown = {outpoint: sat for outpoint, sat in self._shown.items() if outpoint in seen}
        return asked

    async def _show(self, claims: Sequence[Claim]) -> None:
        """Show a batch; if the signer has not seen a channel's funding, show the funding and then the payment again."""
        unshown = await self._remember(claims)
        ready = [claim for claim in unshown if await self._show_funding(claim.outpoint)]
        if ready:
            await self._remember(ready)

    async def _remember(self, claims: Sequence[Claim]) -> list[Claim]:
        """Have the signer remember payments; return those whose funding it must see first."""
        reply = await self._context.signer.show_newest(claims)
        refused = [claims[index] for index in reply.refused if index < len(claims)]
        unshown = [claims[index] for index in reply.unshown if index < len(claims)]
        if refused:
            outpoints = [str(claim.outpoint) for claim in refused]
            log.error(
                "the signer knows newer payments than the store, or has no key of these channels",
                channels=outpoints[:10],
                count=len(refused),
            )
        waiting = {claim.outpoint for claim in unshown}
        self._shown |= {claim.outpoint: claim.payment.change_sat for claim in claims if claim.outpoint not in waiting}
        return unshown

    async def _show_funding(self, outpoint: OutPoint) -> bool:
        """Show one funding transaction and return True; a failure of the node does not stop the other channels."""
        if not self._fundings_left:
            return False
        self._fundings_left -= 1
        try:
            await show(self._context.signer, [outpoint], self._context.chain.transaction)
        except (ChainFailed, SignerRefused) as error:
            log.debug("funding not shown to the signer", channel=str(outpoint), reason=str(error))
            return False
        return True
