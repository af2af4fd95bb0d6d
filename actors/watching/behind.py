"""Finds, once after each start, the open channels whose records are older than the signer's claims.

Such a store is from a backup: restored, a copied directory, or an old disk image. The store itself does not show that,
so the server asks the signer at every start, a page of channels at a time. The signer signs no older payment, and a
settlement that it has signed may confirm at any time. So such a channel adopts the signer's claim before it accepts a
payment, see `protocol.adoption`: a channel that was settled closes; one whose newer payment the signer has seen
continues from that payment. If a channel is woken before its turn, the signer is asked about it first; while the signer
is away, the channel accepts no payments.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from actors.context import Context
from actors.registry import Registry
from paychan.protocol.channel import Accepted, Channel, Close, CloseReason, State
from paychan.protocol.types import OutPoint
from paychan.protocol.wire.signer_messages import MAX_CLAIMS, Newest
from paychan.signer_client.base import SignerAbsent, SignerRefused, news

log = structlog.get_logger("behind")

_UNASKED = "the server could not ask the signer about this channel since the start"
_BEHIND = "the signer knows more of this channel than its record, which is from a backup"


class Behind:
    """Asks the signer about the open channels of the store; the watcher calls `scan` in each of its scans."""

    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._registry = registry
        self._after: tuple[int, OutPoint] | None = None
        self._all_asked = False
        self._behind = dict[OutPoint, Newest]()
        registry.before_waking.append(self._before_waking)

    async def scan(self) -> None:
        """Ask about all open channels, from the end of the last scan; if the signer is away, the next scan asks."""
        while not self._all_asked:
            page = await self._context.store.scan(State.OPEN, after=self._after, limit=MAX_CLAIMS)
            if not await self._ask(page):
                return
            self._after = (page[-1].terms.expiry.lock_time, page[-1].outpoint) if page else None
            self._all_asked = len(page) < MAX_CLAIMS
        await self._ask_remaining()
        for newest in list(self._behind.values()):
            await self._adopt(newest)
        if not self._behind and self._before_waking in self._registry.before_waking:
            self._registry.before_waking.remove(self._before_waking)

    async def _ask_remaining(self) -> None:
        """Ask about channels that are new since their page, or for which the signer was away."""
        unasked = self._context.chain_view.unasked
        late = [outpoint for outpoint in unasked if outpoint not in self._behind]
        records = [await self._registry.read_readable(outpoint) for outpoint in late]
        for outpoint, record in zip(late, records, strict=True):
            if record is not None and record.state is not State.OPEN:
                unasked.pop(outpoint, None)
        still_open = [record for record in records if record is not None and record.state is State.OPEN]
        for begin in range(0, len(still_open), MAX_CLAIMS):
            await self._ask(still_open[begin : begin + MAX_CLAIMS])

    async def _before_waking(self, channel: Channel) -> None:
        if channel.state is State.OPEN and channel.outpoint not in self._behind:
            await self._ask([channel])

    async def _ask(self, channels: Sequence[Channel]) -> bool:
        """Freeze the channels that are behind, or all of them if the signer does not answer; say whether it did."""
        unasked = self._context.chain_view.unasked
        asked = {channel.outpoint: Newest(channel.outpoint, channel.payment.change_sat) for channel in channels}
        try:
            behind = await self._context.signer.behind(list(asked.values())) if asked else ()
        except (SignerAbsent, SignerRefused) as error:
            log.warning("the signer does not tell which records are behind", reason=str(error))
            unasked.update(dict.fromkeys(asked, _UNASKED))
            return False
        for outpoint in asked:
            unasked.pop(outpoint, None)
        unasked.update(dict.fromkeys(behind, _BEHIND))
        self._behind |= {outpoint: asked[outpoint] for outpoint in behind if outpoint in asked}
        return True

    async def _adopt(self, newest: Newest) -> None:
        outpoint = newest.outpoint
        try:
            found = await news(self._context.signer, [newest])
        except (SignerAbsent, SignerRefused) as error:
            log.warning("the signer's claim can't be adopted", channel=str(outpoint), reason=str(error))
            return
        log.error("the record is older than the signer's claim", channel=str(outpoint))
        # the signer can't return settlements that an earlier version of it signed; then the channel only closes
        outcome = await self._registry.ask(outpoint, found[0] if found else Close(CloseReason.OPERATOR))
        record = await self._registry.read_readable(outpoint)
        if isinstance(outcome, Accepted) or record is None or record.state is not State.OPEN:
            self._behind.pop(outpoint)
            self._context.chain_view.unasked.pop(outpoint, None)
        else:
            log.error("a channel with an old record waits", channel=str(outpoint), reason=str(outcome.error))
