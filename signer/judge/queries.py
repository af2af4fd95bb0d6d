"""Answers about the signer itself and its state. They change nothing and are no decisions. For `handler`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    BehindReply,
    BehindRequest,
    Health,
    HealthReply,
    Reply,
    ReserveReply,
    ReserveRequest,
    ShownReply,
    ShownRequest,
    StatusReply,
    StatusRequest,
)
from signer.judge.behind import behind, shown
from signer.judge.facts import Limits
from signer.keys.ring import KeyRing
from signer.ledger.base import Ledger
from signer.ledger.entries import DAY_SECONDS, HOUR_SECONDS

Query: TypeAlias = Health | StatusRequest | ReserveRequest | BehindRequest | ShownRequest
"""A request that changes nothing and is no decision."""


class Identity(NamedTuple):
    """Facts that the signer reports about itself."""

    network: str
    key_mode: str
    debug: bool = False
    protections: tuple[str, ...] = ()


class Room(Protocol):
    """Reports the free space of the disk: `disk.Disk`."""

    @property
    def free_bytes(self) -> int:
        """Free bytes."""

    @property
    def shortage(self) -> str:
        """The reason why only settlements should be written, or ""."""


class Teller:
    """Answers queries."""

    def __init__(
        self,
        keys: KeyRing,
        ledger: Ledger,
        identity: Identity,
        limits: Limits,
        heartbeat: Callable[[], UnixTime],
        disk: Room | None,
        started_at: UnixTime,
    ) -> None:
        self._keys = keys
        self._ledger = ledger
        self._identity = identity
        self._limits = limits
        self._heartbeat = heartbeat
        self._disk = disk
        self._started_at = started_at

    @property
    def shortage(self) -> str:
        """The reason why only settlements should be written, or ""."""
        return self._disk.shortage if self._disk else ""

    def answer(self, request: Query, now: UnixTime) -> Reply:
        """Answer a request that changes nothing and is no decision."""
        match request:
            case Health():
                return self._health(request)
            case StatusRequest():
                return self._status(request, now)
            case ReserveRequest():
                return ReserveReply(request.id, self._keys.reserve().public_key)
            case BehindRequest():
                return BehindReply(request.id, behind(request.payments, self._ledger))
            case ShownRequest():
                return ShownReply(request.id, *shown(request.expires_after, request.after, self._ledger))

    @property
    def _problem(self) -> str:
        return self._ledger.problem or self.shortage

    def _health(self, request: Health) -> Reply:
        identity, limits = self._identity, self._limits
        return HealthReply(
            request.id,
            identity.network,
            identity.key_mode,
            identity.debug,
            self._problem,
            self._ledger.written_at,
            limits.max_fee_percent,
            Sat(limits.max_fee_sat),
            limits.max_fee_sat_per_vb,
            self._keys.identity(),
        )

    def _status(self, request: StatusRequest, now: UnixTime) -> Reply:
        head, flow = self._ledger.head, self._ledger.flow
        return StatusReply(
            request.id,
            self._started_at,
            head.count,
            head.hash,
            flow.within(HOUR_SECONDS, now),
            flow.within(DAY_SECONDS, now),
            self._heartbeat(),
            tuple(sorted(self._limits.trial)),
            self._identity.protections,
            self._problem,
            self._ledger.written_at,
            self._disk.free_bytes if self._disk else 0,
        )
