"""Facts that the rules use besides the request: the signer's own keys, limits, earlier events. All are values.

`gathered` reads them from the ledger, in one step without an await.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from msgspec import Struct, field

from paychan.protocol.expiry import MAX_EXPIRY, MIN_EXPIRY
from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.keys.ring import Destination, SigningKey
from signer.ledger.base import Ledger
from signer.ledger.entries import HOUR_SECONDS, Entries, Flow, Output, request_digest, request_size

TRIABLE = frozenset(
    ("policy-destination", "policy-fee", "policy-watermark", "policy-replacement", "policy-rate", "policy-heartbeat")
)
"""Policies that can be on trial: without the others a settlement would be invalid, or lack a key to sign with."""


class Limits(Struct, frozen=True):
    """Limits set by the operator; for a value or heartbeat limit, 0 means no limit (signer/README.md, settings)."""

    max_fee_percent: int = 50
    max_fee_sat: int = 5_000_000
    max_fee_sat_per_vb: int = 200
    value_per_hour_sat: int = 0
    value_per_day_sat: int = 0
    aged_seconds: int = 0
    """Fundings count as aged this time after they were shown; 0: all are."""
    requests_per_second: int = 1000
    keys_per_second: int = 200
    max_fundings: int = 1_000_000
    heartbeat_seconds: int = 0
    value_without_heartbeat_sat: int = 0
    trial: frozenset[str] = frozenset()
    debug: bool = False
    """There is no real chain, so no funding transactions are shown."""


class OwnKeys(Struct, frozen=True):
    """The signer's own keys that a request names: one for each claim, and the reserve's; None for a foreign key."""

    claims: tuple[SigningKey | None, ...]
    destinations: tuple[Destination, ...]
    reserve: Destination | None = None


class Facts(Struct, frozen=True, dict=True):
    """A request, and all facts that it is judged by. What follows from them is computed once, when a rule needs it."""

    request: SettlementRequest
    own: OwnKeys
    limits: Limits
    outputs: Mapping[OutPoint, Output]
    """Funding outputs and coins, as they were shown."""
    earlier: Entries
    flow: Flow
    heartbeat_at: UnixTime
    """Time of the operator's last heartbeat; 0: none."""
    now: UnixTime
    newest: Mapping[OutPoint, Claim] = field(default_factory=dict)
    """The newest payments that were shown and not settled."""
    requests: Mapping[bytes, SettlementRequest] = field(default_factory=dict)
    """The requests for which `earlier` was signed, by digest."""
    built_upon: tuple[OutPoint, ...] = ()
    """Outputs of earlier settlements that now fund channels: something was signed or shown for them."""

    @cached_property
    def digest(self) -> bytes:
        """See `entries.request_digest`."""
        return request_digest(self.request)

    @cached_property
    def size(self) -> int:
        """Largest size of the settlement in bytes; the request is valid (policy-template)."""
        return request_size(self.request)

    @cached_property
    def new_values_sat(self) -> tuple[Sat, Sat]:
        """Value settled now that was not signed for before, in satoshi: of aged channels, and of young ones."""
        aged_sat = young_sat = 0
        for claim in self.request.claims:
            before = self.earlier.get(claim.outpoint)
            new_sat = max(0, claim.received_sat - (before.received_sat if before else 0))
            if self.is_young(claim.outpoint):
                young_sat += new_sat
            else:
                aged_sat += new_sat
        return Sat(aged_sat), Sat(young_sat)

    def is_young(self, outpoint: OutPoint) -> bool:
        """Whether the channel's funding was shown recently. False in debug mode, where no funding is shown.

        A clock that is set back by up to an hour makes no channel aged. A funding with a time more than an hour ahead
        counts as aged, else it would stay young until that time plus `aged_seconds`.
        """
        shown, aged_seconds = self.outputs.get(outpoint), self.limits.aged_seconds
        return bool(aged_seconds) and shown is not None and -HOUR_SECONDS <= self.now - shown.shown_at < aged_seconds

    @cached_property
    def attended(self) -> bool:
        """Whether the operator's heartbeat is fresh, or not required."""
        seconds = self.limits.heartbeat_seconds
        return not seconds or -HOUR_SECONDS <= self.now - self.heartbeat_at <= seconds


def gathered(
    request: SettlementRequest, own: OwnKeys, limits: Limits, ledger: Ledger, heartbeat_at: UnixTime, now: UnixTime
) -> Facts:
    """Read what the ledger has about the claims and coins of a request. Raises `LedgerFailed`, `DamagedEntry`."""
    outpoints = [claim.outpoint for claim in request.claims]
    coins = [coin.outpoint for coin in request.reserve.coins] if request.reserve else []
    earlier = ledger.read(outpoints)
    digests = {before.digest for before in earlier.values()}
    return Facts(
        request=request,
        own=own,
        limits=limits,
        outputs=ledger.outputs([*outpoints, *coins]),
        earlier=earlier,
        flow=ledger.flow,
        heartbeat_at=heartbeat_at,
        now=now,
        newest=ledger.newest(outpoints),
        requests={digest: old for digest in digests if (old := ledger.request(digest)) is not None},
        built_upon=_built_upon(request, earlier, ledger),
    )


def _built_upon(request: SettlementRequest, earlier: Entries, ledger: Ledger) -> tuple[OutPoint, ...]:
    """Return channels whose funding is the change output of these claims' earlier settlement (RBPCP §6.2).

    Another settlement has another txid, and would remove that output. Raises `LedgerFailed`, `DamagedEntry`.
    """
    found = []
    for claim in request.claims:
        before = earlier.get(claim.outpoint)
        if before is None or not has_readable_terms(claim) or before.change_script != claim.terms.funding_script:
            continue
        settlement = ledger.settlement(before.digest)
        successor = OutPoint(settlement.txid, 0) if settlement is not None else None
        if successor is not None and (ledger.read([successor]) or ledger.newest([successor])):
            found.append(successor)
    return tuple(found)


def has_readable_terms(claim: Claim) -> bool:
    """Say whether a key store can look up its client key and expiry."""
    return MIN_EXPIRY <= claim.terms.expiry.lock_time <= MAX_EXPIRY
