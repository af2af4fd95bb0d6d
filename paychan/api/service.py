"""What every door needs: the operator's settings and the actors behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from actors.opening import Opener
from actors.registry import Registry
from actors.watcher import Watcher
from actors.world import World
from paychan.api.totals import LatestTotals
from paychan.config import ServerConfig
from paychan.supervisor import Supervisor


class OpenStream(Protocol):
    """A client's open payment stream, as far as its end goes."""

    def close(self, code: int | None = None, reason: str | None = None) -> None: ...


@dataclass(frozen=True)
class Service:
    """One running server, as its doors see it."""

    config: ServerConfig
    world: World
    registry: Registry
    opener: Opener
    watcher: Watcher
    supervisor: Supervisor = field(default_factory=Supervisor)
    streams: set[OpenStream] = field(default_factory=set)

    @cached_property
    def totals(self) -> LatestTotals:
        """What the operator is told of all channels."""
        return LatestTotals(self.world, lambda: self.registry.awake)
