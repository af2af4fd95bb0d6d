"""Decisions without a line of their own in the audit log: they are counted, and counts are written with the next line.

Events that strangers cause (keys of channels that may never be opened) and repeated events of a flood must not fill the
disk. A count that is not written yet is lost with the process; a first signature always has its line.
"""

from __future__ import annotations

from threading import Lock

from msgspec import Struct

from signer.audit.chain import Decision, Verdict


class _Kind(Struct, frozen=True):
    peer_uid: int
    asked: str
    verdict: Verdict
    tag: str


class Tally:
    """Counts by user, message, verdict and tag; there are few of each. Callable from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: dict[_Kind, tuple[int, int]] = {}
        """The number, and the time of the first decision in Unix milliseconds."""

    def add(self, decision: Decision) -> None:
        """Count a decision instead of writing it."""
        kind = _Kind(decision.peer_uid, decision.asked, decision.verdict, decision.tag)
        with self._lock:
            number, since_ms = self._counts.get(kind, (0, decision.at_ms))
            self._counts[kind] = number + 1, since_ms

    def take(self, now_ms: int) -> list[Decision]:
        """Make one line of each count, and start again from zero."""
        if not self._counts:
            return []
        with self._lock:
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
