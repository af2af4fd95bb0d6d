"""The ledger as `handlers` see it: what was shown, signed and settled; `ledger` keeps it on disk."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from msgspec import Struct, field

from paychan.protocol.settlement import Claim, Settlement
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.audit.chain import Decision, Head
from signer.ledger.entries import Entries, Output
from signer.ledger.flow import Flow


class LedgerFailed(Exception):
    """The ledger can't be opened, read or written; says what to do."""


class Entry(Struct, frozen=True):
    """What is to be remembered in one go, and the decisions that go with it."""

    decisions: Sequence[Decision] = ()
    signed: Entries = field(default_factory=dict)
    request: SettlementRequest | None = None
    digest: bytes = b""
    outputs: Mapping[OutPoint, Output] = field(default_factory=dict)
    newest: Mapping[OutPoint, Claim] = field(default_factory=dict)
    flow: Flow | None = None


class Ledger(Protocol):
    """What happened before. Whoever reads in order to put holds `lock` meanwhile; other threads wait for it.

    All methods raise `LedgerFailed`, and those that return entries `DamagedEntry`: one can't be trusted.
    """

    @property
    def lock(self) -> threading.Lock:
        """Held from `read` to `put`, so that of two requests for an outpoint the second sees the first."""

    @property
    def flow(self) -> Flow:
        """How much was settled lately."""

    @property
    def shown(self) -> int:
        """How many outputs were shown."""

    @property
    def head(self) -> Head:
        """The last line of the audit log."""

    @property
    def written_at(self) -> UnixTime:
        """When something was last written to disk and synced; 0: not yet."""

    @property
    def problem(self) -> str:
        """Why it can't be read or written, as far as that is known; "": it can."""

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        """Return what was signed for these."""

    def newest(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Claim]:
        """Return the newest payments out of these that were shown."""

    def outputs(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Output]:
        """Return what these hold, as far as it was shown."""

    def request(self, digest: bytes) -> SettlementRequest | None:
        """Return the request with this digest, if it was signed."""

    def settlement(self, digest: bytes) -> Settlement | None:
        """Return what was kept for this digest."""

    def put(self, entry: Entry) -> Future[None]:
        """Remember all of it or nothing; on disk when the future is done. It ends with `LedgerFailed` if that failed."""

    def keep(self, digest: bytes, settlement: Settlement) -> None:
        """Remember what was signed; written by and by, on disk with the next `put`. What is lost can be signed again."""
