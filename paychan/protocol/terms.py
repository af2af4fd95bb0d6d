"""The operator's terms for a new channel, and the time for which earlier terms stay valid.

The server stores nothing about a funding address that it gave out. So a change of price, depth or duration would turn
away a payer that has funded already. To prevent that, the server stores each version of the operator's terms with the
time from which it was in force. An opening is accepted if it satisfies the present terms, or any terms that were in
force within the holding time. So easier terms apply at once.
"""

from __future__ import annotations

from msgspec import Struct, structs

from paychan.protocol.channel import Depth, Rules, View
from paychan.protocol.errors import ExpiryTooLate, ExpiryTooSoon, PaychanError
from paychan.protocol.types import Sat, UnixTime

MOST_HELD = 100
"""Most versions of the terms that are stored; each is a start with changed settings."""

_BLOCK_SECONDS = 600
_LEAD_SECONDS = 3600


class OpeningTerms(Struct, frozen=True):
    """The settings by which an opening is judged: satoshi and seconds; a longest life of 0 means no limit."""

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
        """Put these terms into the present rules; the settlement period is always the present one.

        A channel lives at least for that period, also under terms with a shorter life.
        """
        return structs.replace(
            present,
            min_confirmations=self.min_confirmations,
            smaller=self.smaller,
            min_duration_seconds=max(0, self.least_life_seconds - present.settlement_period_seconds),
            longest_life_seconds=self.longest_life_seconds,
        )


class Held(Struct, frozen=True):
    """Terms, and the Unix time from which they were in force."""

    since: UnixTime
    terms: OpeningTerms


class TermsHistory(Struct, frozen=True):
    """All terms of this operator, the present ones last, and the time for which terms stay valid after their end."""

    held: tuple[Held, ...] = ()
    hold_seconds: int = 0

    def earlier(self, now: UnixTime) -> list[OpeningTerms]:
        """Return the replaced terms that are still valid, the newest first."""
        return [
            before.terms
            for before, after in zip(self.held, self.held[1:], strict=False)
            if now - after.since < self.hold_seconds
        ][::-1]

    def confirmations_needed(self, funding_sat: Sat, opened_at: UnixTime, rules: Rules) -> int:
        """Depth that a channel's funding needs: the lowest of the present terms and those valid at its opening."""
        since = opened_at - self.hold_seconds
        counts = [
            before.terms.rules(rules).confirmations_needed(funding_sat)
            for before, after in zip(self.held, self.held[1:], strict=False)
            if after.since > since and before.since <= opened_at
        ]
        return min([rules.confirmations_needed(funding_sat), *counts])

    def with_present(self, terms: OpeningTerms, now: UnixTime) -> TermsHistory:
        """Add the terms in force from now on; a stored time in the future came from a wrong clock, and becomes now."""
        held = tuple(Held(min(each.since, now), each.terms) for each in self.held)
        if not held or held[-1].terms != terms:
            held = (*held, Held(now, terms))
        return TermsHistory(held[-MOST_HELD:], self.hold_seconds)


def lead_seconds(rules: Rules) -> int:
    """Seconds that a payer needs from the terms to the opening: to send the funding, and for its confirmations.

    Twice the mean time of the blocks, and an hour: six blocks take longer than that once in 3,000 times.
    """
    return _LEAD_SECONDS + 2 * _BLOCK_SECONDS * max(
        [rules.min_confirmations, *(row.confirmations for row in rules.smaller)]
    )


def min_expiry(view: View) -> UnixTime:
    """Expiries must be later than this: room for payments and for settling (RBPCP §7.2, the v2 rule)."""
    return UnixTime(view.now + view.rules.settlement_period_seconds + view.rules.min_duration_seconds)


def expiry_problem(expiry: UnixTime, view: View, lead: int = 0) -> PaychanError | None:
    """Say why no channel with this expiry can open now, or `lead` seconds from now; offers and openings obey it."""
    rules, soonest = view.rules, min_expiry(view) + lead
    if expiry <= soonest:
        return ExpiryTooSoon(got_unix=expiry, need_unix=soonest)
    latest = view.now + rules.longest_life_seconds
    if rules.longest_life_seconds and expiry > latest:
        return ExpiryTooLate(got_unix=expiry, need_unix=latest)
    return None
