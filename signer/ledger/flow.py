"""Value settled recently, in spans of ten minutes; the ledger keeps it for the rules on value. Pure."""

from __future__ import annotations

from msgspec import Struct

from paychan.protocol.types import Sat, UnixTime

_SPAN_SECONDS = 600
"""Sums are kept for spans of this length. A span that ends within the last hour or day counts in full."""

HOUR_SECONDS = 3_600
DAY_SECONDS = 86_400


class Flow(Struct, frozen=True, array_like=True):
    """Value settled recently: (span, satoshi) with the newest last, and the sum since the last fresh heartbeat."""

    spans: tuple[tuple[int, int], ...] = ()
    unattended_sat: int = 0
    young: tuple[tuple[int, int], ...] = ()
    """The same for channels whose funding had been shown only recently; `spans` are those of the others."""

    def within(self, seconds: int, now: UnixTime, *, young: bool | None = None) -> Sat:
        """Sum of this many last seconds, in satoshi: of all channels, or of the young or the aged ones.

        Spans in the future come from a clock that was ahead, see `plus`.
        """
        spans = {None: self.spans + self.young, False: self.spans, True: self.young}[young]
        return Sat(sum(value for span, value in spans if _is_near(span, seconds, now)))

    def plus(self, aged_sat: int, young_sat: int, now: UnixTime, *, attended: bool) -> Flow:
        """Add a settlement, and drop spans older than a day or more than an hour in the future.

        A clock that is set back by less than an hour starts no new allowance. After a clock that was ahead by more is
        corrected, its spans no longer count; otherwise they would use up the limits until that time.
        """
        unattended_sat = 0 if attended else self.unattended_sat + aged_sat + young_sat
        return Flow(_added(self.spans, aged_sat, now), unattended_sat, _added(self.young, young_sat, now))


def _added(spans: tuple[tuple[int, int], ...], value_sat: int, now: UnixTime) -> tuple[tuple[int, int], ...]:
    span = now // _SPAN_SECONDS
    kept = {old: value for old, value in spans if _is_near(old, DAY_SECONDS, now)}
    if value_sat:
        kept[span] = kept.get(span, 0) + value_sat
    return tuple(sorted(kept.items()))


def _is_near(span: int, seconds: int, now: UnixTime) -> bool:
    return (span + 1) * _SPAN_SECONDS > now - seconds and span * _SPAN_SECONDS <= now + HOUR_SECONDS
