"""The watcher closes due channels, resumes unfinished settlements, and survives every failure (threat 34)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from actors.alarm import Alarm, Kind, about
from paychan.protocol.channel import CloseReason, State
from paychan.protocol.errors import ChannelExpiring
from paychan.protocol.fees import ChainFees
from paychan.protocol.record import DamagedRecord
from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, UnixTime
from paychan.signer_client.base import SignerAbsent
from paychan.store.base import StoreFailed
from paychan.supervisor import Supervisor
from tests.lib.channels import NOW, RULES
from tests.lib.world import ALARM_SECONDS, Clock, DebugPayer, Local, accepted, local, refused, until

PERIOD = RULES.settlement_period_seconds
SOON = NOW + PERIOD + RULES.min_duration_seconds + 1
"""Earliest expiry of a channel that opens at `NOW`."""


def payer(name: str, expiry: int = SOON) -> DebugPayer:
    return DebugPayer(name, UnixTime(expiry))


async def state(server: Local, of: DebugPayer) -> State:
    return (await server.stored(of)).state


async def test_threat_6_a_due_channel_is_closed_in_the_first_scan(tmp_path: Path):
    """A channel is closed one settlement period before its expiry, not a second earlier, even after a long sleep."""
    clock, due, not_due = Clock(), payer("due"), payer("not due", SOON + 1)
    async with local(tmp_path, clock) as server:
        await server.open(due)
        await server.open(not_due)
    clock.now = SOON - PERIOD
    async with local(tmp_path, clock) as server:
        await server.watcher.scan()
        closed = await server.stored(due)

        assert (closed.state, await state(server, not_due)) == (State.CLOSED, State.OPEN)
        assert closed.closing is not None
        assert closed.closing.reason is CloseReason.EXPIRY
        assert server.registry.awake == 1


async def test_threat_6_payments_end_when_closing_begins(tmp_path: Path):
    """From the second at which the watcher would close it, a channel accepts no payment, even before the scan."""
    clock, client = Clock(), payer("late")
    async with local(tmp_path, clock) as server:
        await server.open(client, 10_000)
        clock.now = SOON - PERIOD - 1
        accepted(await server.registry.ask(client.outpoint, client.pays(10_001)))
        clock.now += 1

        assert isinstance(refused(await server.registry.ask(client.outpoint, client.pays(10_002))), ChannelExpiring)
        assert (await server.stored(client)).received_sat == 10_001


async def test_a_channel_not_worth_settling_stops_no_other(tmp_path: Path):
    """A channel that received less than its settlement costs stays open; the same scan closes the others."""
    clock, poor, rich = Clock(), payer("poor"), payer("rich", SOON + 1)
    async with local(tmp_path, clock) as server:
        await server.open(poor, 100)
        await server.open(rich, 10_000)
        clock.now = SOON
        await server.watcher.scan()

        assert [await state(server, of) for of in (poor, rich)] == [State.OPEN, State.CLOSED]


async def test_late_channels_cause_an_alarm(tmp_path: Path):
    """The alarm names unsettled channels near expiry, in any state, until they are settled."""
    clock, late = Clock(), payer("late")
    async with local(tmp_path, clock) as server:
        await server.open(late)
        clock.now = SOON - ALARM_SECONDS
        server.signer.fail("sign_settlement", SignerAbsent("asleep"))
        await server.watcher.scan()
        assert server.watcher.alarms == ()
        clock.now += 1
        await server.watcher.scan()
        assert server.watcher.alarms == (about(Kind.LATE, late.outpoint, "unsettled near expiry"),)

        server.signer.heal("sign_settlement")
        await server.watcher.scan()
        assert server.watcher.alarms == ()


async def test_fault_09_a_floor_above_the_cap_of_the_rate_causes_an_alarm(tmp_path: Path):
    """The alarm has both numbers, and ends when the relay minimum is below the cap again."""
    async with local(tmp_path, max_fee_sat_per_vb=200) as server:
        for floor in (230, 200):
            chain_fees = ChainFees(floor_sat_per_vb=floor)

            async def fees(now: ChainFees = chain_fees) -> ChainFees:
                return now

            server.chain.real.fees = fees
            await server.watcher.scan()
            texts = [alarm.text for alarm in server.watcher.alarms if alarm.kind is Kind.FEE]
            assert len(texts) == (floor > 200)
            assert all("230 sat/vB" in text and "200 sat/vB" in text for text in texts)


async def test_fault_16_a_channel_not_worth_settling_raises_no_alarm(tmp_path: Path):
    """A channel that received less than its settlement costs expires, and the operator could not help."""
    clock, poor, rich = Clock(), payer("poor"), payer("rich")
    async with local(tmp_path, clock) as server:
        await server.open(poor, 100)
        await server.open(rich, 10_000)
        server.signer.fail("sign_settlement", SignerAbsent("asleep"))
        clock.now = SOON + 1
        await server.watcher.scan()
        assert [alarm.channel for alarm in server.watcher.alarms if alarm.kind is Kind.LATE] == [str(rich.outpoint)]


async def test_two_hundred_due_channels_are_settled_in_one_scan(tmp_path: Path):
    """One scan settles all channels that expire together."""
    clock = Clock()
    payers = [payer(f"of many {n}", SOON + n % 3) for n in range(200)]
    async with local(tmp_path, clock) as server:
        await asyncio.gather(*map(server.open, payers))
        clock.now = SOON
        await server.watcher.scan()

        assert {await state(server, of) for of in payers} == {State.CLOSED}


FAILURES = {
    "reading the store": ("store", "scan", StoreFailed("I/O error")),
    "reading a record": ("store", "get", DamagedRecord(reason="checksum")),
    "the signer's key": ("signer", "public_key", RuntimeError("bug")),
    "the signature": ("signer", "sign_settlement", RuntimeError("bug")),
    "publishing": ("chain", "publish", OSError("unreachable")),
    "watching": ("chain", "spender", KeyError("result")),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_threat_34_the_watcher_survives_a_failing(tmp_path: Path, failure: str):
    """An unexpected exception of a dependency is logged in each scan, and ends neither watcher nor work."""
    part, method, error = FAILURES[failure]
    clock, client = Clock(), payer("watched")
    async with local(tmp_path, clock) as server:
        await server.open(client)
        server.registry.passivate(0)
        clock.now = SOON
        faulty = getattr(server, part)
        faulty.fail(method, error)
        with capture_logs() as logs:
            watching = Supervisor().run("watcher", server.watcher.run)
            await until(lambda: faulty.calls[method] >= 3)
            assert watching.running
            assert {entry["event"] for entry in logs} & {"watcher failed, scans again", "channel failed"}

            faulty.heal(method)
            await until_state(server, client, State.CLOSED)
            await watching.stop()


async def until_state(server: Local, client: DebugPayer, wanted: State) -> None:
    async with asyncio.timeout(20):
        while await state(server, client) is not wanted:  # noqa: ASYNC110 - the disk sends no event
            await asyncio.sleep(0.001)


async def test_threat_34_a_failing_clock_does_not_end_the_watcher(tmp_path: Path):
    """Without a time the watcher continues to scan, and reports the failure."""
    clock = FailingClock()
    async with local(tmp_path, clock) as server:
        with capture_logs() as logs:
            clock.broken = True
            watching = Supervisor().run("watcher", server.watcher.run)
            await until(lambda: len(logs) >= 2)
            assert server.watcher.alarms == (Alarm(Kind.WATCHER, "watcher failed: no time"),)
            clock.broken = False
            await until(lambda: server.watcher.last_scan == NOW)
            await watching.stop()

        assert server.watcher.alarms == ()


class FailingClock(Clock):
    broken = False

    def __call__(self) -> UnixTime:
        if self.broken:
            msg = "no time"
            raise OSError(msg)
        return super().__call__()


async def test_threat_34_one_broken_channel_holds_up_no_other(tmp_path: Path):
    """If one channel fails unexpectedly, the other due channels are settled and the scan is completed."""
    clock = Clock()
    payers = [payer(f"beside a broken one {n}") for n in range(10)]
    async with local(tmp_path, clock) as server:
        for client in payers:
            await server.open(client)
        server.registry.passivate(0)
        clock.now = SOON
        broken = payers[4]
        server.store.real.get = failing_for(broken.outpoint, server.store.real.get)
        with capture_logs() as logs:
            await server.watcher.scan()

        states = [await state(server, client) for client in payers if client is not broken]
        assert states == [State.CLOSED] * 9
        assert server.watcher.last_scan == clock.now
        assert [entry["channel"] for entry in logs if entry["event"] == "channel failed"] == [str(broken.outpoint)]


def failing_for(outpoint: OutPoint, real: Callable[[OutPoint], Any]) -> Callable[[OutPoint], Any]:
    async def get(asked: OutPoint) -> Any:
        if asked == outpoint:
            msg = "checksum"
            raise DamagedRecord(reason=msg)
        return await real(asked)

    return get


async def test_threat_34_a_signer_that_hangs_on_one_channel_holds_up_no_other(tmp_path: Path):
    """While the signer hangs on one channel, the same scan settles the others."""
    clock, answers = Clock(), asyncio.Event()
    stuck, free = payer("stuck"), [payer(f"free {n}", SOON + 1) for n in range(5)]
    async with local(tmp_path, clock) as server:
        for client in (stuck, *free):
            await server.open(client)
        clock.now = SOON
        server.signer.real.sign_settlement = hanging_for(stuck.outpoint, answers, server.signer.real.sign_settlement)
        looking = asyncio.create_task(server.watcher.scan())
        for client in free:
            await until_state(server, client, State.CLOSED)
        assert not looking.done()
        answers.set()
        await looking

        assert await state(server, stuck) is State.CLOSED


def hanging_for(outpoint: OutPoint, gate: asyncio.Event, real: Callable[..., Any]) -> Callable[..., Any]:
    async def sign_settlement(claims: Sequence[Claim], *meaning: Any) -> Any:
        if claims[0].outpoint == outpoint:
            await gate.wait()
        return await real(claims, *meaning)

    return sign_settlement


async def test_the_same_scan_twice_changes_nothing(tmp_path: Path):
    """The record of a settled channel is the same after any number of scans."""
    clock, client = Clock(), payer("settled")
    async with local(tmp_path, clock) as server:
        await server.open(client)
        clock.now = SOON
        await server.watcher.scan()
        before = await server.stored(client)
        for _ in range(3):
            await server.watcher.scan()

        assert msgspec.msgpack.encode(await server.stored(client)) == msgspec.msgpack.encode(before)
