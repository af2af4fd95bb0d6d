"""Chooses which decisions get a line of their own in the audit log, and which are only counted. For `handler`."""

from __future__ import annotations

from collections.abc import Callable

from paychan.protocol.wire.signer_messages import KeyRequest, Refusal, Request, SettlementRequest
from signer.audit.chain import Decision, Verdict
from signer.audit.summary import about
from signer.audit.tally import Tally
from signer.judge.rate import Budget
from signer.ledger.base import Entry, Ledger
from signer.ledger.entries import request_digest

LINES_PER_SECOND = 10
"""Lines for refusals and repeated signatures; above this rate they are counted, for a log must not fill the disk."""


class Journal:
    """Writes or counts decisions.

    A new event, above all a new signature, always has a line. Any other decision has one while the rate is low and the
    disk has room. A key request never has one: any stranger can cause it.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float], is_short: Callable[[], bool]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._is_short = is_short
        self._budget = Budget(LINES_PER_SECOND, clock())
        self._tally = Tally()

    def decision(
        self, request: Request, peer_uid: int, verdict: Verdict, refusal: Refusal | None = None, digest: bytes = b""
    ) -> Decision:
        """Build the log entry of a decision about a request."""
        if not digest and isinstance(request, SettlementRequest):
            digest = request_digest(request)
        return Decision(
            at_ms=int(self._clock() * 1000),
            peer_uid=peer_uid,
            asked=type(request).__name__,
            about=about(request),
            digest=digest.hex(),
            verdict=verdict,
            tag=refusal.tag if refusal else "",
            reason=refusal.reason if refusal else "",
        )

    def lines(self, *decisions: Decision, is_new: bool = True) -> list[Decision]:
        """Return the lines to write now: the counts so far, then these decisions; or count these, return []."""
        if is_new or self._has_room(decisions[0]):
            return [*self._tally.take(decisions[0].at_ms), *decisions]
        for each in decisions:
            self._tally.add(each)
        return []

    def _has_room(self, decision: Decision) -> bool:
        return decision.asked != KeyRequest.__name__ and not self._is_short() and self._budget.take(self._clock())

    def count(self, request: Request, peer_uid: int, verdict: Verdict, refusal: Refusal | None = None) -> None:
        """Count a decision, even if there is room for a line."""
        self._tally.add(self.decision(request, peer_uid, verdict, refusal))

    def refuse(self, request: Request, peer_uid: int, refusal: Refusal) -> None:
        """Write or count a refusal. Raises `LedgerFailed`."""
        lines = self.lines(self.decision(request, peer_uid, "refused", refusal), is_new=False)
        if lines:
            self._ledger.put(Entry(lines))

    def close(self) -> None:
        """Write the counts. The ledger must still be open. Raises `LedgerFailed`."""
        if counts := self._tally.take(int(self._clock() * 1000)):
            self._ledger.put(Entry(counts))
