"""What every door needs: the operator's settings and the actors behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from actors.opening import Opener
from actors.registry import Registry
from actors.watcher import Watcher
from actors.world import World
from paychan.api.streamplaces import Places
from paychan.api.totals import LatestTotals
from paychan.api.turns import Turns
from paychan.config import ServerConfig
from paychan.supervisor import Supervisor


@dataclass(frozen=True)
class Service:
    """One running server, as its doors see it."""

    config: ServerConfig
    world: World
    registry: Registry
    opener: Opener
    watcher: Watcher
    supervisor: Supervisor = field(default_factory=Supervisor)

    @cached_property
    def streams(self) -> Places:
        """The payment streams that are open."""
        stream, http = self.config.stream, self.config.http
        return Places(stream.max_streams, stream.max_streams_per_channel, http.max_bad_signatures)

    @cached_property
    def turns(self) -> Turns:
        """The turns in which streams are read."""
        return Turns()

    @cached_property
    def totals(self) -> LatestTotals:
        """What the operator is told of all channels."""
        return LatestTotals(self.world, lambda: self.registry.awake)
