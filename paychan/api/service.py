"""The parts that every interface needs: the operator's settings, the actors, and the limits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tornado.httputil import HTTPHeaders

from actors.context import Context
from actors.find_by_key import Finder
from actors.opening.opener import Opener
from actors.registry import Registry
from actors.roles import Settling
from actors.totals import LatestTotals
from paychan.api import forwarded
from paychan.api.budgets.descriptors import Descriptors
from paychan.api.budgets.request_rates import RequestRates
from paychan.api.budgets.stream_slots import StreamSlots
from paychan.api.budgets.turns import Turns
from paychan.callback.outbox import Outbox
from paychan.config import ServerConfig
from paychan.memory import Memory
from paychan.missing import MissingChannels
from paychan.supervisor import Supervisor

_CANCELLATIONS = 3


@dataclass(frozen=True)
class Service:
    """The parts of one running server that its interfaces use."""

    config: ServerConfig
    context: Context
    registry: Registry
    opener: Opener
    settling: Settling | None
    """The role that settles, if this process has it."""
    descriptors: Descriptors
    outbox: Outbox | None = None
    """Delivers messages to the application, if one is configured."""
    supervisor: Supervisor = field(default_factory=Supervisor)
    memory: Memory = field(default_factory=Memory)
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    """Tasks of the requests that handlers work on."""

    def keep(self, task: asyncio.Task[Any] | None) -> None:
        """Remember the task of a request until it is done."""
        if task is not None:
            self.requests.add(task)
            task.add_done_callback(self.requests.discard)

    async def drop_requests(self) -> None:
        """Cancel the requests of connections that are closed, because the store and the signer are closed next."""
        for _ in range(_CANCELLATIONS):  # repeated, in case a library swallows the cancellation
            running = list(self.requests)
            if not running:
                return
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=1)

    @cached_property
    def streams(self) -> StreamSlots:
        """The slots of payment streams."""
        stream, http = self.config.stream, self.config.http
        most = min(stream.max_streams, self.descriptors.clients // 2)  # the other half is for payments by PUT
        return StreamSlots(most, stream.max_streams_per_channel, http.max_bad_signatures)

    @cached_property
    def turns(self) -> Turns:
        """The turns of the event loop in which streams are read."""
        return Turns()

    @cached_property
    def request_rates(self) -> RequestRates:
        """The rate limit of requests about new channels, for each client address."""
        return RequestRates(self.config.http.asks_per_second)

    def client_address(self, headers: HTTPHeaders, peer: str) -> str:
        """Return the IP address of a client; `peer` is that of the connection, which may be a trusted proxy's."""
        return forwarded.address(headers, peer) if self.config.http.trust_forwarded else peer

    @cached_property
    def unbelieved(self) -> forwarded.Unbelieved:
        """Warns once about headers of a proxy that the server does not trust."""
        return forwarded.Unbelieved(trusts=self.config.http.trust_forwarded)

    @cached_property
    def finder(self) -> Finder:
        """Finds channels by their client's key."""
        return Finder(self.context.store)

    @cached_property
    def missing(self) -> MissingChannels:
        """The channels that the store lacks, as far as the signer knows."""
        return MissingChannels(self.context, self.config.state_dir)

    @cached_property
    def totals(self) -> LatestTotals:
        """The totals over all channels, for the operator."""
        return LatestTotals(self.context, lambda: self.registry.awake)
