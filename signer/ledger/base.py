"""The ledger's interface for `handler`: everything that was shown, signed and settled; `leveldb` keeps it on disk."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from paychan.protocol.settlement import Claim, Settlement
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.audit.chain import Decision, Head
from signer.ledger.entries import Entries, Flow, Output


class LedgerFailed(Exception):
    """The ledger can't be opened, read or written; the text says how to mend it."""


class Entry(Struct, frozen=True):
    """Facts to record atomically, and the decisions that belong to them."""

    decisions: Sequence[Decision] = ()
    signed: Entries = field(default_factory=dict)
    request: SettlementRequest | None = None
    digest: bytes = b""
    outputs: Mapping[OutPoint, Output] = field(default_factory=dict)
    newest: Mapping[OutPoint, Claim] = field(default_factory=dict)
    flow: Flow | None = None


class Ledger(Protocol):
    """Record of earlier events, for callers on one event loop.

    Of two requests for an outpoint the second must see the first: a caller does not await between `read` and `put`. All
    methods raise `LedgerFailed`; those that return entries also raise `DamagedEntry`: one can't be trusted.
    """

    @property
    def flow(self) -> Flow:
        """Value settled in the last day, by time."""

    @property
    def shown(self) -> int:
        """Number of outputs that were shown."""

    @property
    def head(self) -> Head:
        """The last line of the audit log."""

    @property
    def written_at(self) -> UnixTime:
        """Time of the last synced write; 0: none yet."""

    @property
    def problem(self) -> str:
        """The reason why it can't be read or written, as far as known; "": it can."""

    def read(self, outpoints: Collection[OutPoint]) -> Entries:
        """Return the signed entries of these outpoints."""

    def newest(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Claim]:
        """Return the newest payments of these channels that were shown."""

    def shown_after(self, after: OutPoint | None, limit: int) -> list[tuple[OutPoint, Claim | None]]:
        """Return channels of which payments were shown, in a fixed order that begins behind `after`.

        The claim is the newest one shown; None: it is damaged.
        """

    def outputs(self, outpoints: Collection[OutPoint]) -> dict[OutPoint, Output]:
        """Return these outputs, as far as they were shown."""

    def request(self, digest: bytes) -> SettlementRequest | None:
        """Return the request with this digest, if it was signed."""

    def settlement(self, digest: bytes) -> Settlement | None:
        """Return the settlement that was kept for this digest."""

    def put(self, entry: Entry) -> Awaitable[None]:
        """Record all of it or nothing. Awaiting the result waits for the disk, and raises `LedgerFailed`."""

    def keep(self, digest: bytes, settlement: Settlement) -> None:
        """Record a signed settlement; synced with the next `put`. If it is lost, it can be signed again."""
