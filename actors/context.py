"""Everything an actor may reach, all through contracts: a simulation replaces these and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.exposure import Exposure
from actors.group_commit import GroupCommit
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


@dataclass
class ChainView:
    """What is known of the chain now; `actors.watching.funding` keeps it. Empty, it stops nothing."""

    tip: Tip | None = None
    fees: ChainFees = field(default_factory=ChainFees)
    problem: str = ""
    """Why no payment at all is accepted at the moment."""
    in_danger: dict[OutPoint, str] = field(default_factory=dict)
    """Channels that take no payments at the moment, and why: their funding output is not there as it should be."""
    agreed: Reading | None = None
    """The last reading of the clocks that a block agreed with, see `protocol.moment`."""
    unasked: dict[OutPoint, str] = field(default_factory=dict)
    """Open channels that take no payments since the start, because the signer may have settled them; and why."""
    is_whole: bool = True
    """False until all open channels were looked at since the start: `Context.exposure` may lack some."""


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
    """What new channels were asked for before, which holds for some time."""
    storage_problem: Callable[[], PaychanError | None] = lambda: None
    """Why nothing new is begun while the disk is nearly full."""
    memory_problem: Callable[[], PaychanError | None] = lambda: None
    """Why nothing new is begun while memory is nearly used up."""
    exposure: Exposure = field(default_factory=Exposure)
    """Funding without a confirmation, of channels that are open or being opened, and its limit."""
    batch_seconds: int = 0
    """Drained channels wait so long for others, to be settled together; 0: none waits."""
    batch_channels: int = 20
    withdraw_above_sat: int = 0
    """Channels that can go on are withdrawn from when they have received so much; 0: none is."""
    coalesce: bool = True
    """Of several payments that came together the newest is verified first; see `protocol.several`."""
    chain_view: ChainView = field(default_factory=ChainView)
    unsigned: Unsigned = field(default_factory=Unsigned)
    """Settlements that could not be signed."""
    steady: Callable[[], float] = time.monotonic
    """A clock that is never set, in seconds since any moment."""

    def now(self) -> UnixTime:
        """Wall clock or the chain's median time past, whichever is worse for us: the later. Only refusals go by it."""
        tip, now = self.chain_view.tip, self.clock()
        return now if tip is None or tip.median_time < now else tip.median_time

    def acting_time(self) -> UnixTime:
        """The time by which channels are closed: a wall clock that no witness agrees with does not count.

        Before a block was seen it is 0: there is nothing yet to judge the clock by, and nowhere to publish to.
        """
        seen = self.chain_view
        if seen.tip is None:
            return UnixTime(0)
        reading = self.reading()
        if not is_believed(reading, seen.tip.time, seen.agreed):
            return seen.tip.median_time
        return max(reading.wall, seen.tip.median_time)

    def paying_time(self) -> UnixTime:
        """The time by which fee rates rise."""
        tip = self.chain_view.tip
        return paying_time(self.now(), tip.median_time if tip else None)

    def reading(self) -> Reading:
        return Reading(self.clock(), self.steady())

    def confirmations_needed(self, channel: Channel) -> int:
        """Depth that a channel's funding output must keep, by the terms that it was opened with, or the present ones."""
        return self.terms.confirmations_needed(channel.funding_sat, channel.opened_at, self.rules)

    def depth(self, channel: Channel) -> int:
        """Confirmations that end a channel; one that goes on at its change output needs those of a funding output."""
        if channel.moves:
            return max(1, self.rules.confirmations_needed(channel.payment.change_sat))
        return self.settlement_confirmations

    def view(self, outpoint: OutPoint | None = None) -> View:
        """The moment, as the channel machine judges it."""
        seen = self.chain_view
        frozen = seen.problem or (seen.in_danger.get(outpoint, "") if outpoint is not None else "")
        if seen.unasked and outpoint is not None:
            frozen = frozen or seen.unasked.get(outpoint, "")
        median_time = seen.tip.median_time if seen.tip else None
        return View(self.now(), self.rules, frozen, median_time, seen.fees.floor_sat_per_vb)
