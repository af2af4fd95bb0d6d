"""What an operator asks of a new channel, how long that holds for addresses that were given out, and who judges it.

Nothing is kept of an address that was given out. So a changed price, depth or duration would turn away a payer who has
funded already: instead the operator's own terms are kept with the time from which each held. An opening is accepted that
satisfies the present terms, or any that were in force within the holding time. Terms that became easier count at once.
"""

from __future__ import annotations

from msgspec import Struct, structs

from paychan.protocol.channel import Depth, Rules, View
from paychan.protocol.errors import ExpiryTooLate, ExpiryTooSoon, PaychanError
from paychan.protocol.types import Sat, UnixTime

MOST_HELD = 100
"""Terms that are kept: each is a start with changed settings."""

_BLOCK_SECONDS = 600
_LEAD_SECONDS = 3600


class OpeningTerms(Struct, frozen=True):
    """The settings that an opening is judged by: amounts in satoshi, times in seconds; 0 as the longest life: no limit."""

    v1_price_sat: Sat
    v2_price_sat: Sat
    min_confirmations: int
    smaller: tuple[Depth, ...]
    least_life_seconds: int
    longest_life_seconds: int

    def price_sat(self, *, v2: bool) -> Sat:
        """Least first payment."""
        return self.v2_price_sat if v2 else self.v1_price_sat

    def rules(self, present: Rules) -> Rules:
        """Put these into the present rules. The settlement period is always the present one, and none ends within it."""
        return structs.replace(
            present,
            min_confirmations=self.min_confirmations,
            smaller=self.smaller,
            min_duration_seconds=max(0, self.least_life_seconds - present.settlement_period_seconds),
            longest_life_seconds=self.longest_life_seconds,
        )


class Held(Struct, frozen=True):
    """Terms, and the Unix time from which they held."""

    since: UnixTime
    terms: OpeningTerms


class TermsHistory(Struct, frozen=True):
    """The terms of this operator, the present ones last, and for how long one holds after its end."""

    held: tuple[Held, ...] = ()
    hold_seconds: int = 0

    def earlier(self, now: UnixTime) -> list[OpeningTerms]:
        """Return what was in force within the holding time and is not any more, the newest first."""
        return [
            before.terms
            for before, after in zip(self.held, self.held[1:], strict=False)
            if now - after.since < self.hold_seconds
        ][::-1]

    def confirmations_needed(self, funding_sat: Sat, opened_at: UnixTime, rules: Rules) -> int:
        """Depth that a channel's funding needs: the least that it may have been opened with, or needs now."""
        since = opened_at - self.hold_seconds
        counts = [
            before.terms.rules(rules).confirmations_needed(funding_sat)
            for before, after in zip(self.held, self.held[1:], strict=False)
            if after.since > since and before.since <= opened_at
        ]
        return min([rules.confirmations_needed(funding_sat), *counts])

    def with_present(self, terms: OpeningTerms, now: UnixTime) -> TermsHistory:
        """Note what holds from now on; a time that is not yet was a clock's mistake, and counts as now."""
        held = tuple(Held(min(each.since, now), each.terms) for each in self.held)
        if not held or held[-1].terms != terms:
            held = (*held, Held(now, terms))
        return TermsHistory(held[-MOST_HELD:], self.hold_seconds)


def lead_seconds(rules: Rules) -> int:
    """Time that a payer needs between the terms and the opening: to send the funding, and for its depth.

    Twice what blocks take in the mean, and an hour: six blocks take longer than that once in 3,000 times.
    """
    return _LEAD_SECONDS + 2 * _BLOCK_SECONDS * max(
        [rules.min_confirmations, *(row.confirmations for row in rules.smaller)]
    )


def min_expiry(view: View) -> UnixTime:
    """Expiries must be later than this: room for payments and for settling (RBPCP §7.2, the v2 rule)."""
    return UnixTime(view.now + view.rules.settlement_period_seconds + view.rules.min_duration_seconds)


def expiry_problem(expiry: UnixTime, view: View, lead: int = 0) -> PaychanError | None:
    """Say why no channel with this expiry can be opened now, or `lead` seconds from now. Both doors ask this."""
    rules, soonest = view.rules, min_expiry(view) + lead
    if expiry <= soonest:
        return ExpiryTooSoon(got_unix=expiry, need_unix=soonest)
    latest = view.now + rules.longest_life_seconds
    if rules.longest_life_seconds and expiry > latest:
        return ExpiryTooLate(got_unix=expiry, need_unix=latest)
    return None
