"""Charges requests to channels, gives back what was not delivered, and reads channels, through the actors.

The gateway's proxy, the merchant interface and the facilitator share it, so that a satoshi pays once, whatever the door.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeAlias

from msgspec import Struct

from actors.registry import Registry
from paychan.protocol.channel import Accepted, Channel, CloseByProof, Outcome, Rejected
from paychan.protocol.charges import Charge, Delivered, Release
from paychan.protocol.credit import find_delivery
from paychan.protocol.errors import ChannelMoved, PaychanError
from paychan.protocol.payment import Payment
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.offers import ChannelState


class Charged(Struct, frozen=True):
    """A request whose charge is on disk."""

    channel: Channel
    """The channel after the charge."""
    request: bytes
    charged_sat: Sat
    """Sum that the request was charged, also by earlier calls."""

    @property
    def outpoint(self) -> OutPoint:
        return self.channel.outpoint


Result: TypeAlias = Charged | PaychanError


class Charges:
    """Charges and releases. Each result is on disk when it is returned."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._tasks: set[asyncio.Task[Outcome]] = set()

    async def find(self, outpoint: OutPoint) -> Channel | None:
        """Return a channel's newest record, without waking it; it may be newer than the disk."""
        return await self._registry.read(outpoint)

    async def charge(
        self, outpoint: OutPoint, request: bytes, total_sat: Sat, payment: Payment | None = None
    ) -> Result:
        """Book the payment and raise the request's charge to its total; see `credit.charge`."""
        outcome = await self._registry.ask(outpoint, Charge(request, total_sat, payment))
        return _result(outcome, request)

    async def release(self, outpoint: OutPoint, request: bytes, to_sat: Sat = Sat(0)) -> Result:
        """Lower the request's charge; if the channel has moved since, where it continues."""
        outcome = await self._registry.ask(outpoint, Release(request, to_sat))
        if isinstance(outcome, Rejected) and isinstance(outcome.error, ChannelMoved):
            txid, _, vout = outcome.error.fields["outpoint"].partition(":")
            return await self.release(OutPoint.parse(txid, int(vout)), request, to_sat)
        return _result(outcome, request)

    def release_later(self, outpoint: OutPoint, request: bytes, to_sat: Sat = Sat(0)) -> None:
        """Release without waiting, for a caller that is being cancelled."""
        self._keep(self._registry.ask(outpoint, Release(request, to_sat)))

    def delivered(self, outpoint: OutPoint, request: bytes) -> None:
        """Note that the answer has begun to leave: the charge is final. The channel's next write records it."""
        actor = self._registry.find_awake(outpoint)
        if actor is not None:
            actor.ask(Delivered(frozenset([request])))  # it takes the message at once

    async def close(self, outpoint: OutPoint, payment: Payment) -> Channel | PaychanError:
        """Close a channel for the client that shows its newest payment."""
        outcome = await self._registry.ask(outpoint, CloseByProof(payment))
        return outcome.error if isinstance(outcome, Rejected) else outcome.channel

    def _keep(self, work: Coroutine[Any, Any, Outcome]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def shown_state(channel: Channel, *, proof: bool) -> ChannelState:
    """Return the state of a channel for its payer; `proof` adds the newest payment with its signature.

    The credit from before a withdrawal is counted at the output where the channel is now. In v1 the newest payment
    alone closes a channel, so it is not shown to a caller that may have seen an older one.
    """
    return ChannelState(
        channel=channel.outpoint,
        capacity_sat=channel.funding_sat,
        accepted_sat=channel.received_sat,
        spent_sat=Sat(max(0, channel.spent_sat - channel.withdrawn_sat)),
        expiry=channel.terms.expiry.unix_time,
        newest=channel.payment if proof and channel.secret else None,
        carried_sat=Sat(max(0, channel.withdrawn_sat - channel.spent_sat)),
    )


def _result(outcome: Outcome, request: bytes) -> Result:
    if isinstance(outcome, Accepted):
        known = find_delivery(outcome.channel, request)
        return Charged(outcome.channel, request, known.charged_sat if known else Sat(0))
    return outcome.error
