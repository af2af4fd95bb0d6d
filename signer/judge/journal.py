"""Decisions for the audit log: the summary of a request, and the choice which decisions get a line or are only counted.

Events that strangers cause (keys of channels that may never be opened) and repeated events of a flood must not fill the
disk: they are counted, and the counts are written with the next line. A count that is not written yet is lost with the
process; a first signature always has its line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from paychan.protocol.wire.signer_messages import (
    AgainRequest,
    CertificateRequest,
    ChildRequest,
    FundingRequest,
    KeyRequest,
    NewestRequest,
    OtherKeysRequest,
    Refusal,
    Request,
    SettlementRequest,
)
from signer.audit.chain import Decision, Verdict
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


class _Kind(Struct, frozen=True):
    peer_uid: int
    asked: str
    verdict: Verdict
    tag: str


class Tally:
    """Counts by user, message, verdict and tag; there are few of each."""

    def __init__(self) -> None:
        self._counts: dict[_Kind, tuple[int, int]] = {}
        """The number, and the time of the first decision in Unix milliseconds."""

    def add(self, decision: Decision) -> None:
        """Count a decision instead of writing it."""
        kind = _Kind(decision.peer_uid, decision.asked, decision.verdict, decision.tag)
        number, since_ms = self._counts.get(kind, (0, decision.at_ms))
        self._counts[kind] = number + 1, since_ms

    def take(self, now_ms: int) -> list[Decision]:
        """Make one line of each count, and start again from zero."""
        counts, self._counts = self._counts, {}
        return [
            Decision(
                at_ms=now_ms,
                peer_uid=kind.peer_uid,
                asked=kind.asked,
                about={"count": number, "since_ms": since_ms},
                digest="",
                verdict=kind.verdict,
                tag=kind.tag,
                reason="counted, not logged one by one",
            )
            for kind, (number, since_ms) in counts.items()
        ]


def about(request: Request) -> dict[str, Any]:
    """Summarise a request in JSON types, without secrets; txids in the byte order that wallets show."""
    match request:
        case SettlementRequest():
            return _settlement(request)
        case ChildRequest():
            return {**_settlement(request.parent), "child_fee_sat": request.fee_sat}
        case KeyRequest() | OtherKeysRequest():
            return {"client_key": request.client_key.hex(), "expiry": request.expiry}
        case FundingRequest():
            return {"transaction_bytes": len(request.transaction), "outputs": list(request.outputs)}
        case NewestRequest():
            received_sat = sum(claim.funding_sat - claim.payment.change_sat for claim in request.claims)
            return {"payments": len(request.claims), "received_sat": received_sat}
        case CertificateRequest():
            return {
                "receipt_key": request.receipt_key.hex(),
                "not_before": request.not_before,
                "not_after": request.not_after,
            }
        case AgainRequest():
            return {"outpoint": str(request.outpoint)}
        case _:
            return {}


def _settlement(request: SettlementRequest) -> dict[str, Any]:
    claims = [
        {
            "outpoint": str(claim.outpoint),
            "funding_sat": claim.funding_sat,
            "change_sat": claim.payment.change_sat,
            "change_script": claim.change_script.hex(),
        }
        for claim in request.claims
    ]
    summary: dict[str, Any] = {
        "claims": claims,
        "destination": request.destination_script.hex(),
        "fee_sat": request.fee_sat,
    }
    if request.reserve is not None:
        summary["coins"] = [str(coin.outpoint) for coin in request.reserve.coins]
    return summary
