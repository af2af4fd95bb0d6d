"""What the rules know besides a request: keys of ours, limits, and what happened before. Values, all of them."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from paychan.protocol.types import OutPoint, Sat, UnixTime
from signer.keys import Destination, SigningKey
from signer.signed import Entries, Output

_SPAN_SECONDS = 600
"""Sums are kept for spans of this length. What began within the last hour or day counts in full: never too little."""

HOUR_SECONDS = 3_600
DAY_SECONDS = 86_400


TRIABLE = frozenset(
    ("policy-destination", "policy-fee", "policy-watermark", "policy-replacement", "policy-rate", "policy-heartbeat")
)
"""Policies that can be tried out: without the others there would be no valid settlement, or nobody to answer."""


class Limits(Struct, frozen=True):
    """What the operator set; 0 means no limit where that makes sense (README, signer settings)."""

    max_fee_percent: int = 50
    max_fee_sat: int = 5_000_000
    value_per_hour_sat: int = 0
    value_per_day_sat: int = 0
    requests_per_second: int = 1000
    max_fundings: int = 1_000_000
    heartbeat_seconds: int = 0
    value_without_heartbeat_sat: int = 0
    trial: frozenset[str] = frozenset()
    debug: bool = False
    """The chain is a pretence: there are no funding transactions to be shown."""


class Flow(Struct, frozen=True, array_like=True):
    """How much was settled lately: (span, satoshi) with the newest last, and the sum since the last fresh heartbeat."""

    spans: tuple[tuple[int, int], ...] = ()
    unattended_sat: int = 0

    def within(self, seconds: int, now: UnixTime) -> Sat:
        """Sum of the spans of the last so many seconds; those to come are of a clock that was ahead, see `plus`."""
        return Sat(sum(value for span, value in self.spans if _is_near(span, seconds, now)))

    def plus(self, value_sat: int, now: UnixTime, *, attended: bool) -> Flow:
        """Add what is settled now, and forget what is older than a day, or further ahead than an hour.

        A clock that is set back by less than an hour starts no new allowance; one that was ahead for longer counts for
        nothing once it is right, else it would use up the limits until its own time has come.
        """
        span = now // _SPAN_SECONDS
        kept = {old: value for old, value in self.spans if _is_near(old, DAY_SECONDS, now)}
        kept[span] = kept.get(span, 0) + value_sat
        return Flow(tuple(sorted(kept.items())), 0 if attended else self.unattended_sat + value_sat)


def _is_near(span: int, seconds: int, now: UnixTime) -> bool:
    return (span + 1) * _SPAN_SECONDS > now - seconds and span * _SPAN_SECONDS <= now + HOUR_SECONDS


class Own(Struct, frozen=True):
    """Keys of ours that a request names: one for each claim, and the reserve's; None for what is not ours."""

    claims: tuple[SigningKey | None, ...]
    destinations: tuple[Destination, ...]
    reserve: Destination | None = None


class Known(Struct, frozen=True):
    """What a request is judged by."""

    own: Own
    limits: Limits
    outputs: Mapping[OutPoint, Output]
    """What was shown of funding outputs and coins."""
    earlier: Entries
    flow: Flow
    heartbeat_at: UnixTime
    """The operator's last sign of life; 0: none."""
    now: UnixTime

    @property
    def attended(self) -> bool:
        """Whether the operator gave a sign of life lately, or need not."""
        seconds = self.limits.heartbeat_seconds
        return not seconds or -HOUR_SECONDS <= self.now - self.heartbeat_at <= seconds
