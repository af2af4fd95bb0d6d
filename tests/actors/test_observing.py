"""Observers: what they receive, in which order, and that one that raises disturbs nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog

from actors.channel import Payments
from actors.observing import (
    ChannelChanged,
    Event,
    GroupWritten,
    Observers,
    PartHealth,
    PaymentBooked,
    PaymentRefused,
    RequestRefused,
)
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Accepted, Close, CloseReason, Rejected, State
from tests.lib.world import DebugPayer, accepted, local, refused

PAYER = DebugPayer("observed")
ALL = frozenset((ChannelChanged, GroupWritten, PartHealth, PaymentBooked, PaymentRefused, RequestRefused))


class Recording:
    """An observer that keeps what it receives, and raises an error if it has one."""

    def __init__(self, events: frozenset[type[Event]] = ALL, error: BaseException | None = None) -> None:
        self.events = events
        self.error = error
        self.seen: list[Event] = []

    def observe(self, event: Event) -> None:
        self.seen.append(event)
        if self.error is not None:
            raise self.error


async def life(server: Any) -> None:
    """Open, pay and be refused by both ways to an actor (a door that tells one reports its refusals), close."""
    await server.open(PAYER, 10_000)
    accepted(await server.registry.ask(PAYER.outpoint, PAYER.pays(20_000)))
    refused(await server.registry.ask(PAYER.outpoint, PAYER.pays(15_000)))
    for paid, kind in ((30_000, Accepted), (25_000, Rejected)):
        answer = asyncio.get_running_loop().create_future()
        actor = server.registry.find_awake(PAYER.outpoint)
        actor.tell(Payments([PAYER.pays(paid)], lambda done, answer=answer: answer.set_result(done.outcomes)))
        outcomes = await answer
        server.registry.report_refusals(PAYER.outpoint, outcomes)
        assert isinstance(outcomes[0], kind)
    accepted(await server.registry.ask(PAYER.outpoint, Close(CloseReason.OPERATOR)))
    await server.watcher.scan()
    assert (await server.stored(PAYER)).state is State.CLOSED


async def test_an_observer_receives_what_happened(tmp_path: Path) -> None:
    """Only what is on disk counts as booked or changed, in the order of the writes."""
    observer = Recording()
    async with local(tmp_path, settings={"observers": Observers(observer)}) as server:
        await life(server)
        server.chain.fail("tip", ChainFailed("no node"), times=1)
        await server.watcher.scan()
        await server.watcher.scan()
    states = [event.after.state for event in observer.seen if isinstance(event, ChannelChanged)]
    assert states == [State.OPEN, State.CLOSING, State.PUBLISHED, State.CLOSED]
    booked = [event for event in observer.seen if isinstance(event, PaymentBooked)]
    assert [(event.value_sat, event.received_sat) for event in booked] == [
        (10_000, 10_000),
        (10_000, 20_000),
        (10_000, 30_000),
    ]
    codes = [event.code for event in observer.seen if isinstance(event, PaymentRefused)]
    assert codes == ["value_backwards"] * 2
    assert sum(event.changes for event in observer.seen if isinstance(event, GroupWritten)) >= 6
    health = [event for event in observer.seen if isinstance(event, PartHealth)]
    assert [event.part for event in health] == ["chain", "chain"]
    assert "no node" in health[0].problem
    assert not health[1].problem


@pytest.mark.parametrize("error", [ValueError("a bug"), RecursionError()])
async def test_an_observer_that_raises_disturbs_nothing(tmp_path: Path, error: Exception) -> None:
    """Payments, refusals and the settlement go on; the next observer receives all; the log tells once per kind."""
    bad, good = Recording(error=error), Recording()
    with structlog.testing.capture_logs() as logs:
        async with local(tmp_path, settings={"observers": Observers(bad, good)}) as server:
            await life(server)
            assert not server.failures
    assert bad.seen == good.seen
    told = [line["kind"] for line in logs if line["event"] == "an observer failed"]
    assert sorted(told) == sorted({type(event).__name__ for event in bad.seen})


async def test_an_unwanted_event_is_not_passed_on(tmp_path: Path) -> None:
    """An observer receives only the kinds of events that it names."""
    observer = Recording(frozenset((ChannelChanged,)))
    async with local(tmp_path, settings={"observers": Observers(observer)}) as server:
        await life(server)
    assert {type(event) for event in observer.seen} == {ChannelChanged}
