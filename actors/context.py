"""Everything outside that an actor uses, behind contracts: a simulation replaces only these."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.exposure import Exposure
from actors.group_commit import GroupCommit
from actors.observing import Observers
from actors.unsigned import Unsigned
from paychan.callback.base import Application
from paychan.chain.base import Chain, Tip
from paychan.protocol.channel import Channel, Rules, View
from paychan.protocol.errors import PaychanError
from paychan.protocol.fees import ChainFees
from paychan.protocol.moment import Reading, is_believed, paying_time
from paychan.protocol.terms import TermsHistory
from paychan.protocol.types import Network, OutPoint, UnixTime
from paychan.signer_client.base import Signer
from paychan.store.base import Store


def wall_clock() -> UnixTime:
    """Return the machine's time."""
    return UnixTime(int(time.time()))


@dataclass
class ChainView:
    """The server's present knowledge of the chain; `actors.watching.funding` updates it. Empty, it stops no payment."""

    tip: Tip | None = None
    fees: ChainFees = field(default_factory=ChainFees)
    problem: str = ""
    """Reason why the server accepts no payments at all now; empty if it accepts them."""
    in_danger: dict[OutPoint, str] = field(default_factory=dict)
    """Channels that accept no payments now, with the reason: their funding output is missing or not deep enough."""
    agreed: Reading | None = None
    """The last reading of the clocks that agreed with a block, see `protocol.moment`."""
    unasked: dict[OutPoint, str] = field(default_factory=dict)
    """Open channels that accept no payments because the signer may have settled them, with the reason."""
    is_whole: bool = True
    """False until the first scan since the start has checked all open channels: `Context.exposure` may lack some."""


@dataclass(frozen=True)
class Context:
    """Store, chain, signer, application, clock and the operator's rules."""

    network: Network
    rules: Rules
    settlement_confirmations: int
    clock: Callable[[], UnixTime]
    store: Store
    commits: GroupCommit
    chain: Chain
    signer: Signer
    application: Application | None = None
    terms: TermsHistory = field(default_factory=TermsHistory)
    """Earlier terms for new channels, which stay valid for some time."""
    storage_problem: Callable[[], PaychanError | None] = lambda: None
    """Returns the refusal of new channels while the disk is nearly full."""
    memory_problem: Callable[[], PaychanError | None] = lambda: None
    """Returns the refusal of new channels and of waking channels while memory is nearly used up."""
    exposure: Exposure = field(default_factory=Exposure)
    """Unconfirmed funding of channels that are open or being opened, and its limit."""
    batch_seconds: int = 0
    """Longest time that a drained channel waits to be settled together with others; 0: no channel waits."""
    batch_channels: int = 20
    """Most channels in one settlement."""
    withdraw_above_sat: int = 0
    """Received value, in satoshi, from which a channel that can continue is withdrawn from; 0: never."""
    coalesce: bool = True
    """Of several payments that came together the newest is verified first; see `protocol.payment_batch`."""
    chain_view: ChainView = field(default_factory=ChainView)
    unsigned: Unsigned = field(default_factory=Unsigned)
    """Settlements that could not be signed."""
    observers: Observers = field(default_factory=Observers)
    """Receivers of the events that actors and doors report; the log is one."""
    steady: Callable[[], float] = time.monotonic
    """A clock that is never adjusted, in seconds since an arbitrary moment."""

    def now(self) -> UnixTime:
        """The later of wall clock and median time past, which is the stricter one. Only refusals use it."""
        tip, now = self.chain_view.tip, self.clock()
        return now if tip is None or tip.median_time < now else tip.median_time

    def acting_time(self) -> UnixTime:
        """The time by which the server closes channels: it ignores a wall clock that no witness agrees with.

        0 before the server has seen a block: it can't check the clock yet, and can't broadcast a settlement.
        """
        seen = self.chain_view
        if seen.tip is None:
            return UnixTime(0)
        reading = self.reading()
        if not is_believed(reading, seen.tip.time, seen.agreed):
            return seen.tip.median_time
        return max(reading.wall, seen.tip.median_time)

    def paying_time(self) -> UnixTime:
        """Time on the fee curve, see `protocol.moment`."""
        tip = self.chain_view.tip
        return paying_time(self.now(), tip.median_time if tip else None)

    def reading(self) -> Reading:
        return Reading(self.clock(), self.steady())

    def confirmations_needed(self, channel: Channel) -> int:
        """Depth that a channel's funding must keep: the lowest of the terms at its opening and the present ones."""
        return self.terms.confirmations_needed(channel.funding_sat, channel.opened_at, self.rules)

    def depth(self, channel: Channel) -> int:
        """Confirmations that end a channel; if it continues at its change output, those of a funding output."""
        if channel.moves:
            return max(1, self.rules.confirmations_needed(channel.payment.change_sat))
        return self.settlement_confirmations

    def view(self, outpoint: OutPoint | None = None) -> View:
        """The facts by which the state machine judges a command for a channel now."""
        seen = self.chain_view
        frozen = seen.problem or (seen.in_danger.get(outpoint, "") if outpoint is not None else "")
        if seen.unasked and outpoint is not None:
            frozen = frozen or seen.unasked.get(outpoint, "")
        median_time = seen.tip.median_time if seen.tip else None
        return View(self.now(), self.rules, frozen, median_time, seen.fees.floor_sat_per_vb)
