"""What the rules know besides a request: keys of ours, limits, and what happened before. Values, all of them."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, UnixTime
from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.keys.ring import Destination, SigningKey
from signer.ledger.entries import Entries, Output
from signer.ledger.flow import HOUR_SECONDS, Flow

TRIABLE = frozenset(
    ("policy-destination", "policy-fee", "policy-watermark", "policy-replacement", "policy-rate", "policy-heartbeat")
)
"""Policies that can be tried out: without the others there would be no valid settlement, or nobody to answer."""


class Limits(Struct, frozen=True):
    """What the operator set; 0 means no limit where that makes sense (signer/README.md, settings)."""

    max_fee_percent: int = 50
    max_fee_sat: int = 5_000_000
    max_fee_sat_per_vb: int = 200
    value_per_hour_sat: int = 0
    value_per_day_sat: int = 0
    aged_seconds: int = 0
    """Fundings that were shown so long ago count as aged; 0: all."""
    requests_per_second: int = 1000
    keys_per_second: int = 200
    max_fundings: int = 1_000_000
    heartbeat_seconds: int = 0
    value_without_heartbeat_sat: int = 0
    trial: frozenset[str] = frozenset()
    debug: bool = False
    """The chain is a pretence: there are no funding transactions to be shown."""


class OwnKeys(Struct, frozen=True):
    """Keys of ours that a request names: one for each claim, and the reserve's; None for what is not ours."""

    claims: tuple[SigningKey | None, ...]
    destinations: tuple[Destination, ...]
    reserve: Destination | None = None


class Facts(Struct, frozen=True):
    """What a request is judged by."""

    own: OwnKeys
    limits: Limits
    outputs: Mapping[OutPoint, Output]
    """What was shown of funding outputs and coins."""
    earlier: Entries
    flow: Flow
    heartbeat_at: UnixTime
    """The operator's last sign of life; 0: none."""
    now: UnixTime
    newest: Mapping[OutPoint, Claim] = field(default_factory=dict)
    """The newest payments that were shown and not settled."""
    requests: Mapping[bytes, SettlementRequest] = field(default_factory=dict)
    """What was asked for when `earlier` was signed, by digest."""
    built_upon: tuple[OutPoint, ...] = ()
    """Outputs of what was signed earlier that are channels now: something was signed or shown for them."""

    def is_young(self, outpoint: OutPoint) -> bool:
        """Whether its funding was shown only lately. In debug mode, where no funding is shown, none is.

        A clock that is set back by up to an hour ages none; what was shown by one that was ahead for longer is aged, else it
        would be young until that time has come and `aged_seconds` more.
        """
        shown, aged_seconds = self.outputs.get(outpoint), self.limits.aged_seconds
        return bool(aged_seconds) and shown is not None and -HOUR_SECONDS <= self.now - shown.shown_at < aged_seconds

    @property
    def attended(self) -> bool:
        """Whether the operator gave a sign of life lately, or need not."""
        seconds = self.limits.heartbeat_seconds
        return not seconds or -HOUR_SECONDS <= self.now - self.heartbeat_at <= seconds
