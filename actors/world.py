"""Everything an actor may reach, all through contracts: a simulation replaces these and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from actors.commit import GroupCommit
from paychan.application.base import Application
from paychan.chain.base import Chain
from paychan.protocol.channel import Rules, View
from paychan.protocol.types import Network, UnixTime
from paychan.signing.base import Signer
from paychan.store.base import Store


@dataclass(frozen=True)
class World:
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
    frozen: list[str] = field(default_factory=list)
    """Reasons not to accept payments at the moment; empty while all is well."""

    def view(self) -> View:
        """The moment, as the channel machine judges it."""
        return View(self.clock(), self.rules, self.frozen[0] if self.frozen else "")
