"""The log as an observer: a line for each turn of a channel's life and of a part's health.

At level `debug` also for each payment, refusal and write. The ids of a line come from `paychan.tracing`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from actors.observing import (
    ChannelChanged,
    Event,
    GroupWritten,
    PartHealth,
    PaymentBooked,
    PaymentRefused,
    RequestRefused,
)
from paychan.protocol.channel import Channel, State
from paychan.protocol.settlement import outpoints_of
from paychan.protocol.types import OutPoint
from paychan.shared.wording import clock

log = structlog.get_logger("events")

_CHANGES = {
    State.OPEN: "channel open",
    State.CLOSING: "channel closing",
    State.PUBLISHED: "settlement published",
    State.CLOSED: "channel settled",
    State.LOST: "channel lost",
    State.UNFUNDED: "channel unfunded",
}


PATIENCE_SECONDS = 5.0
"""Parts that are started together with the server, or again, are there by then."""


class EventLog:
    """Writes events as log lines. `everything`: also those of single payments, requests and writes.

    A part that stays away for `patience_seconds` is an error; one that is late at a start is not.
    """

    def __init__(self, *, everything: bool = False, patience_seconds: float = PATIENCE_SECONDS) -> None:
        rare: frozenset[type[Event]] = frozenset((ChannelChanged, PartHealth))
        many: frozenset[type[Event]] = frozenset((PaymentBooked, PaymentRefused, RequestRefused, GroupWritten))
        self.events = rare | many if everything else rare
        self._patience_seconds = patience_seconds
        self._away: dict[str, str] = {}
        self._waiting: dict[str, asyncio.TimerHandle] = {}

    def observe(self, event: Event) -> None:
        """Write a line."""
        match event:
            case ChannelChanged(before=before, after=after):
                _log_change(before, after)
            case PartHealth(part=part, problem=problem):
                self._log_health(part, problem)
            case PaymentBooked(outpoint=outpoint, value_sat=value_sat, received_sat=received_sat):
                log.debug("payment booked", channel=str(outpoint), value_sat=value_sat, received_sat=received_sat)
            case PaymentRefused(outpoint=outpoint, code=code):
                log.debug("payment refused", channel=str(outpoint), code=code)
            case RequestRefused(code=code):
                log.debug("request refused", code=code)
            case GroupWritten(changes=changes, seconds=seconds):
                log.debug("group written", changes=changes, seconds=round(seconds, 6))

    def _log_health(self, part: str, problem: str) -> None:
        was_away = part in self._away
        if not problem:
            self._away.pop(part, None)
            if timer := self._waiting.pop(part, None):
                timer.cancel()
            log.info("a part is usable", part=part)
            return
        self._away[part] = problem
        if not was_away:
            loop = asyncio.get_running_loop()
            self._waiting[part] = loop.call_later(self._patience_seconds, self._stays_away, part)
        elif part not in self._waiting:
            log.error("a part is not usable", part=part, reason=problem)

    def _stays_away(self, part: str) -> None:
        self._waiting.pop(part, None)
        log.error("a part is not usable", part=part, reason=self._away[part])


def _log_change(before: Channel | None, after: Channel) -> None:
    """Write a line with the amounts in satoshi; `fee_sat` is that of the whole transaction, which may settle several."""
    facts: dict[str, Any] = {"channel": str(after.outpoint), "state": after.state.value}
    facts |= {"funding_sat": after.funding_sat, "received_sat": after.received_sat}
    if before is None:
        log.info("channel opened", **facts, expires=clock(after.terms.expiry.unix_time))
        return
    event, closing = _CHANGES[after.state], after.closing
    if closing is not None:
        facts["reason"] = closing.reason.value
        txid = closing.spent_by or (closing.settlement.txid if closing.settlement else b"")
        if txid:
            facts["txid"] = txid[::-1].hex()
        if closing.settlement and closing.settlement.txid == txid:
            facts["fee_sat"] = closing.settlement.fee_sat
            facts["inputs"] = len(outpoints_of(closing.settlement.transaction))
        if after.moves and after.state is State.CLOSED:
            event, facts["moved_to"] = "earnings withdrawn", str(OutPoint(txid, 0))
    log.info(event, **facts)
