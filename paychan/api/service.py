"""What every door needs: the operator's settings and the actors behind it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from actors.context import Context
from actors.find_by_key import Finder
from actors.opening.opener import Opener
from actors.registry import Registry
from actors.totals import LatestTotals
from actors.watching.expiry import Watcher
from paychan.api.budgets.descriptors import Descriptors
from paychan.api.budgets.request_rates import RequestRates
from paychan.api.budgets.stream_slots import Places
from paychan.api.budgets.turns import Turns
from paychan.config import ServerConfig
from paychan.memory import Memory
from paychan.supervisor import Supervisor

_CANCELLATIONS = 3


@dataclass(frozen=True)
class Service:
    """One running server, as its doors see it."""

    config: ServerConfig
    context: Context
    registry: Registry
    opener: Opener
    watcher: Watcher
    descriptors: Descriptors
    supervisor: Supervisor = field(default_factory=Supervisor)
    memory: Memory = field(default_factory=Memory)
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    """Requests that handlers work for."""

    def keep(self, task: asyncio.Task[Any] | None) -> None:
        """Remember the task of a request until it is done."""
        if task is not None:
            self.requests.add(task)
            task.add_done_callback(self.requests.discard)

    async def drop_requests(self) -> None:
        """Cancel what still works for connections that are closed: the store and the signer are closed next."""
        for _ in range(_CANCELLATIONS):  # again, should a library swallow it
            running = list(self.requests)
            if not running:
                return
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=1)

    @cached_property
    def streams(self) -> Places:
        """The payment streams that are open."""
        stream, http = self.config.stream, self.config.http
        most = min(stream.max_streams, self.descriptors.clients // 2)  # payments by PUT keep the other half
        return Places(most, stream.max_streams_per_channel, http.max_bad_signatures)

    @cached_property
    def turns(self) -> Turns:
        """The turns in which streams are read."""
        return Turns()

    @cached_property
    def askers(self) -> RequestRates:
        """How fast each client address asks about new channels."""
        return RequestRates(self.config.http.asks_per_second)

    @cached_property
    def finder(self) -> Finder:
        """Finds channels by their client's key."""
        return Finder(self.context.store)

    @cached_property
    def totals(self) -> LatestTotals:
        """What the operator is told of all channels."""
        return LatestTotals(self.context, lambda: self.registry.awake)
