"""How much was settled lately, in spans of ten minutes: what the ledger keeps for the rules on value. Pure."""

from __future__ import annotations

from msgspec import Struct

from paychan.protocol.types import Sat, UnixTime

_SPAN_SECONDS = 600
"""Sums are kept for spans of this length. What began within the last hour or day counts in full: never too little."""

HOUR_SECONDS = 3_600
DAY_SECONDS = 86_400


class Flow(Struct, frozen=True, array_like=True):
    """How much was settled lately: (span, satoshi) with the newest last, and the sum since the last fresh heartbeat."""

    spans: tuple[tuple[int, int], ...] = ()
    unattended_sat: int = 0
    young: tuple[tuple[int, int], ...] = ()
    """The same of channels whose funding had been shown only lately; `spans` are those of the others."""

    def within(self, seconds: int, now: UnixTime, *, young: bool | None = None) -> Sat:
        """Sum of the last so many seconds: of all channels, or of the young or the aged ones.

        Spans to come are of a clock that was ahead, see `plus`.
        """
        spans = {None: self.spans + self.young, False: self.spans, True: self.young}[young]
        return Sat(sum(value for span, value in spans if _is_near(span, seconds, now)))

    def plus(self, aged_sat: int, young_sat: int, now: UnixTime, *, attended: bool) -> Flow:
        """Add what is settled now, and forget what is older than a day, or further ahead than an hour.

        A clock that is set back by less than an hour starts no new allowance; one that was ahead for longer counts for
        nothing once it is right, else it would use up the limits until its own time has come.
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
