"""What the rules know besides a request: keys of ours, limits, and what happened before. Values, all of them."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.keys.ring import Destination, SigningKey
from signer.ledger.entries import Entries, Output

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
    max_fee_sat_per_vb: int = 200
    value_per_hour_sat: int = 0
    value_per_day_sat: int = 0
    aged_seconds: int = 0
    """Fundings that were shown so long ago count as aged; 0: all."""
    requests_per_second: int = 1000
    keys_per_second: int = 200
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
    newest: Mapping[OutPoint, Claim] = field(default_factory=dict)
    """The newest payments that were shown and not settled."""
    requests: Mapping[bytes, SettlementRequest] = field(default_factory=dict)
    """What was asked for when `earlier` was signed, by digest."""
    built_upon: tuple[OutPoint, ...] = ()
    """Outputs of what was signed earlier that are channels now: something was signed or shown for them."""

    def is_young(self, outpoint: OutPoint) -> bool:
        """Whether its funding was shown only lately. In debug mode, where no funding is shown, none is.

        A clock that is set back by up to an hour ages none; what was shown by one that was ahead for longer is aged, else it
        would be young until that time has come and `aged_seconds` more.
        """
        shown, aged_seconds = self.outputs.get(outpoint), self.limits.aged_seconds
        return bool(aged_seconds) and shown is not None and -HOUR_SECONDS <= self.now - shown.shown_at < aged_seconds

    @property
    def attended(self) -> bool:
        """Whether the operator gave a sign of life lately, or need not."""
        seconds = self.limits.heartbeat_seconds
        return not seconds or -HOUR_SECONDS <= self.now - self.heartbeat_at <= seconds
