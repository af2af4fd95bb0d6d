"""A ledger for the signer in memory, for tests that need no disk."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any

from paychan.protocol.settlement import Claim, Settlement
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.audit.chain import BEGINNING, Decision, Head, encode_lines
from signer.ledger.base import Entry
from signer.ledger.entries import Entries, Flow, Output
from tests.lib import background


def put_together(ledger: Any, entries: Sequence[Entry]) -> list[Any]:
    """Record entries, wait until all are on disk, and return the groups that were written together."""

    async def together() -> list[Any]:
        groups = [ledger.put(entry) for entry in entries]
        for group in groups:
            await group
        return groups

    return background.run(together)


def put(ledger: Any, entry: Entry) -> None:
    """Record an entry, and wait until it is on disk. Raises `LedgerFailed`."""
    put_together(ledger, [entry])


class Written:
    """The result of a `put` that is done already."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


class MemoryLedger:
    """A `signer.ledger.leveldb.Ledger`."""

    def __init__(self) -> None:
        self.flow = Flow()
        self.head: Head = BEGINNING
        self.entries: Entries = {}
        self.shown_outputs: dict[OutPoint, Output] = {}
        self.requests: dict[bytes, SettlementRequest] = {}
        self.settlements: dict[bytes, Settlement] = {}
        self.payments: dict[OutPoint, Claim] = {}
        self.written_at = UnixTime(0)
        self.problem = ""
        self.decisions: list[Decision] = []
        self.lines: list[bytes] = []

    @property
    def shown(self) -> int:
        return len(self.shown_outputs)

    @property
    def remembered(self) -> tuple[object, ...]:
        """Return a copy of the state that a refusal must not change."""
        return (
            dict(self.entries),
            dict(self.shown_outputs),
            dict(self.requests),
            dict(self.settlements),
            dict(self.payments),
            self.flow,
        )

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        return {outpoint: self.entries[outpoint] for outpoint in outpoints if outpoint in self.entries}

    def outputs(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Output]:
        return {outpoint: self.shown_outputs[outpoint] for outpoint in outpoints if outpoint in self.shown_outputs}

    def newest(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Claim]:
        return {outpoint: self.payments[outpoint] for outpoint in outpoints if outpoint in self.payments}

    def shown_after(self, after: OutPoint | None, limit: int) -> list[tuple[OutPoint, Claim | None]]:
        order = sorted(self.payments.items(), key=lambda shown: shown[0].serialize())
        behind = [shown for shown in order if after is None or shown[0].serialize() > after.serialize()]
        return [*behind[:limit]]

    def request(self, digest: bytes) -> SettlementRequest | None:
        return self.requests.get(digest)

    def settlement(self, digest: bytes) -> Settlement | None:
        return self.settlements.get(digest)

    def put(self, entry: Entry) -> Written:
        self.entries.update(entry.signed)
        self.shown_outputs.update(entry.outputs)
        self.payments.update(entry.newest)
        if entry.request is not None:
            self.requests[entry.digest] = entry.request
        self.flow = entry.flow or self.flow
        self.decisions += entry.decisions
        lines, self.head = encode_lines(entry.decisions, self.head)
        self.lines += lines.splitlines(keepends=True)
        return Written()

    def keep(self, digest: bytes, settlement: Settlement) -> None:
        self.settlements[digest] = settlement
