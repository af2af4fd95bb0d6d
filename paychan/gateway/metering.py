"""Metered answers: each unit is charged right before it is sent, and the answer pauses while the credit is used up.

The request itself was charged one unit. Every further one raises the charge of the same request, so a repetition after
a lost answer begins with the units that are paid already. When the credit does not cover the next unit, an event stream
gets the event `payment-need-voucher` (`bindings/mpp.md`), and the answer waits for a payment that comes by another
request, a payment stream or the REST interface. Without one it ends after `pause_seconds`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from time import monotonic

import msgspec
from aiohttp import web

from paychan.gateway.cashier import Cashier, Paid
from paychan.gateway.charging import Charged, shown_state
from paychan.gateway.pricefile import KILOBYTE_BYTES
from paychan.gateway.prices import Route
from paychan.protocol.types import Sat
from paychan.protocol.unpaid import CreditTooLow
from paychan.protocol.wire.mpp_outcomes import NEED_VOUCHER_EVENT, RECEIPT_EVENT, need_voucher_json

EVENT_STREAM = "text/event-stream"

_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_END_OF_LINE = re.compile(rb"\n")
_POLL_SECONDS = 0.1
_LONGEST_EVENT = 1_000_000
"""A longer piece without an end of an event is sent as one event."""


class MeterEnded(Exception):
    """No payment came for the next unit, or the channel takes none any more."""


class Meter:
    """Counts and charges the units of one answer."""

    def __init__(self, route: Route, paid: Paid, charged: Charged, cashier: Cashier) -> None:
        self._route, self._paid, self._cashier = route, paid, cashier
        self.charged = charged
        self._price_sat = route.amount_sat
        self._covered = charged.charged_sat // route.amount_sat
        self._begun = monotonic()
        self._paused_seconds = 0.0

    async def cover(self, units: int) -> int:
        """Charge up to this number of units in all, as far as the credit goes; return the number that is charged.

        Raises:
            MeterEnded: the channel takes no charge any more.
        """
        while self._covered < units:
            result = await self._charge(units)
            if isinstance(result, Charged):
                break
            affordable = self._covered + int(result.fields["got_sat"]) // self._price_sat
            if affordable <= self._covered:
                break
            units = affordable
        return self._covered

    async def _charge(self, units: int) -> Charged | CreditTooLow:
        channel, request = self.charged.outpoint, self.charged.request
        result = await self._cashier.charges.charge(channel, request, Sat(units * self._price_sat))
        if isinstance(result, Charged):
            self.charged, self._covered = result, units
        elif not isinstance(result, CreditTooLow):
            raise MeterEnded from result
        return result

    async def paused(self, request: web.BaseRequest) -> None:
        """Wait for credit for the next unit.

        Raises:
            MeterEnded: none came in `pause_seconds`, or the payer has gone.
        """
        begun = monotonic()
        while monotonic() < begun + self._route.pause_seconds and request.transport is not None:
            channel = await self._cashier.charges.find(self.charged.outpoint)
            if channel is not None and channel.credit_sat >= self._price_sat:
                self._paused_seconds += monotonic() - begun
                return
            await asyncio.sleep(_POLL_SECONDS)
        raise MeterEnded

    def seconds(self) -> int:
        """Units of time that have begun since the answer began, without its pauses."""
        return int(monotonic() - self._begun - self._paused_seconds) + 1

    def need(self) -> dict[str, str]:
        """Return the data of `payment-need-voucher`."""
        return need_voucher_json(shown_state(self.charged.channel, proof=False), self._price_sat)

    def receipt(self) -> dict[str, object]:
        """Return the data of `payment-receipt`, the last event."""
        return self._cashier.receipt_json(self._paid, self.charged)


class MeteredBody:
    """The body of an answer, cut into pieces that are paid."""

    def __init__(self, meter: Meter, route: Route, content_type: str, request: web.BaseRequest) -> None:
        self._meter, self._unit, self._request = meter, route.unit, request
        self._is_events = content_type == EVENT_STREAM
        self._sent = 0

    async def pieces(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the paid pieces, with events about the payment between those of an event stream.

        Raises:
            MeterEnded: the payment for the rest did not come.
        """
        by_unit = {"event": self._by_event, "second": self._by_second}.get(self._unit, self._by_size)
        async for piece in by_unit(chunks):
            yield piece
        if self._is_events:
            yield _event(RECEIPT_EVENT, self._meter.receipt())

    async def _paid_pieces(self, first: int, last: int) -> AsyncIterator[tuple[int, bytes]]:
        """Charge the units after `first` up to `last`; yield how far each step came, or an event before a pause."""
        while first < last:
            covered = min(await self._meter.cover(last), last)
            if covered > first:
                first = covered
                yield first, b""
            else:
                if self._is_events:
                    yield first, _event(NEED_VOUCHER_EVENT, self._meter.need())
                await self._meter.paused(self._request)

    async def _by_event(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for events in _whole_events(chunks, _END_OF_EVENT if self._is_events else _END_OF_LINE):
            begun, sent = self._sent, 0
            async for covered, notice in self._paid_pieces(begun, begun + len(events)):
                yield notice or b"".join(events[sent : covered - begun])
                sent = covered - begun
            self._sent += len(events)

    async def _by_size(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        size = KILOBYTE_BYTES if self._unit == "kilobyte" else 1
        async for chunk in chunks:
            first, end, at = -(-self._sent // size), -(-(self._sent + len(chunk)) // size), 0
            if first == end:  # the rest of a kilobyte that was paid
                yield chunk
            async for covered, notice in self._paid_pieces(first, end):
                upto = min(covered * size - self._sent, len(chunk))
                yield notice or chunk[at:upto]
                at = at if notice else upto
            self._sent += len(chunk)

    async def _by_second(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            async for _, notice in self._paid_pieces(self._sent, self._meter.seconds()):
                if notice:
                    yield notice
            self._sent = self._meter.seconds()
            yield chunk


async def _whole_events(chunks: AsyncIterator[bytes], end: re.Pattern[bytes]) -> AsyncIterator[list[bytes]]:
    """Yield the events that each chunk completes."""
    rest = b""
    async for chunk in chunks:
        rest += chunk
        events, at = [], 0
        for found in end.finditer(rest):
            events.append(rest[at : found.end()])
            at = found.end()
        rest = rest[at:]
        if len(rest) > _LONGEST_EVENT:
            events.append(rest)
            rest = b""
        if events:
            yield events
    if rest:
        yield [rest]


def _event(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
