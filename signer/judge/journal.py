"""Chooses which decisions get a line of their own in the audit log, and which are counted. For `handlers`."""

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
"""Lines for refusals and for what was signed before; what comes faster is counted, for a log must not fill the disk."""


class Journal:
    """What is new, a signature above all, always has a line. Called from several threads.

    Everything else has one while it comes slowly and there is room on the disk. A key never has: strangers cause them.
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
        """Describe a decision about a request."""
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
        """Return the lines to write now: of these decisions, and before them of what was counted; or count these."""
        if is_new or self._has_room(decisions[0]):
            return [*self._tally.take(decisions[0].at_ms), *decisions]
        for each in decisions:
            self._tally.add(each)
        return []

    def _has_room(self, decision: Decision) -> bool:
        return decision.asked != KeyRequest.__name__ and not self._is_short() and self._budget.take(self._clock())

    def count(self, request: Request, peer_uid: int, verdict: Verdict, refusal: Refusal | None = None) -> None:
        """Count a decision, whatever room there is."""
        self._tally.add(self.decision(request, peer_uid, verdict, refusal))

    def refuse(self, request: Request, peer_uid: int, refusal: Refusal) -> None:
        """Write or count a refusal. Raises `LedgerFailed`."""
        lines = self.lines(self.decision(request, peer_uid, "refused", refusal), is_new=False)
        if lines:
            self._ledger.put(Entry(lines))

    def close(self) -> None:
        """Write what was counted. The ledger is still open. Raises `LedgerFailed`."""
        if counts := self._tally.take(int(self._clock() * 1000)):
            self._ledger.put(Entry(counts))
