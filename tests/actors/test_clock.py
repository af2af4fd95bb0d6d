"""No irreversible action follows from a single reading of a clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.alarm import Kind
from paychan.chain.base import ChainFailed, Tip
from paychan.chain.debug import DebugChain
from paychan.protocol.channel import Close, CloseReason, State
from paychan.protocol.errors import ChainUnavailable
from paychan.protocol.types import UnixTime
from paychan.shared.wording import clock
from tests.lib.channels import NOW, RULES
from tests.lib.looped import looped
from tests.lib.world import Clock, DebugPayer, Local, accepted, local, refused

HOUR, DAY = 3_600, 86_400
PERIOD = RULES.settlement_period_seconds
STALE_SECONDS = 3 * HOUR


class Blocks(DebugChain):
    """A chain whose newest block the test sets."""

    def __init__(self, block_time: int = NOW) -> None:
        super().__init__(lambda: NOW)
        self.mine(block_time)

    def mine(self, block_time: int, median_time: int | None = None) -> None:
        """Add a block of this time, an hour after the median time past."""
        median = block_time - HOUR if median_time is None else median_time
        self.newest = Tip(1, f"{block_time:064x}", UnixTime(block_time), UnixTime(median))

    def forget(self) -> None:
        """Remove all settlements, as a reorg does."""
        self._spends.clear()

    async def tip(self) -> Tip:
        return self.newest


class Shop(Local):
    """A server with a channel, whose clocks and blocks the test sets."""

    blocks: Any
    steady: Any
    payer: Any

    def later(self, seconds: int, *, wall: bool = True, steady: bool = True) -> None:
        """Let time pass for both clocks or one of them."""
        self.clock.now += seconds if wall else 0
        self.steady.now += seconds if steady else 0

    async def state(self) -> State:
        return (await self.stored(self.payer)).state

    @property
    def kinds(self) -> list[Kind]:
        return [alarm.kind for alarm in self.watcher.alarms]


@asynccontextmanager
async def shop(
    directory: Path, *, wall: int = NOW, expiry: int = NOW + 5 * DAY, stale_seconds: int = STALE_SECONDS
) -> AsyncIterator[Shop]:
    """Open a channel, and start with a wall clock that may be wrong."""
    blocks, clock, steady = Blocks(), Clock(wall), Clock(1_000)
    payer = DebugPayer("watched by the clock", UnixTime(expiry))
    async with local(
        directory, clock, chain=blocks, stale_seconds=stale_seconds, settings={"steady": lambda: float(steady.now)}
    ) as server:
        await server.fill([payer.channel()])
        parts = {name: getattr(server, name) for name in server.__struct_fields__}
        yield Shop(**parts, blocks=blocks, steady=steady, payer=payer)


async def test_fault_06_a_week_ahead_for_one_scan_closes_nothing(tmp_path: Path):
    """Payments stop with one alarm that names both times, no channel closes, and all resumes with a correct clock."""
    async with shop(tmp_path) as server:
        await server.watcher.scan()
        assert server.watcher.alarms == ()
        server.clock.now += 7 * DAY
        server.later(2)
        await server.watcher.scan()

        assert await server.state() is State.OPEN
        assert server.kinds == [Kind.CLOCK]
        text = server.watcher.alarms[0].text
        assert clock(server.clock.now) in text
        assert clock(server.clock.now - 7 * DAY - 2) in text
        pay = server.payer.pays(10_001)
        assert isinstance(refused(await server.registry.ask(server.payer.outpoint, pay)), ChainUnavailable)

        server.clock.now -= 7 * DAY
        await server.watcher.scan()
        assert server.watcher.alarms == ()
        accepted(await server.registry.ask(server.payer.outpoint, pay))


@pytest.mark.parametrize("stale_seconds", [0, STALE_SECONDS])
@pytest.mark.parametrize("ahead", [3 * HOUR, 7 * DAY, 400 * DAY, 2**33])
async def test_fault_06_ahead_at_the_first_scan_closes_nothing(tmp_path: Path, ahead: int, stale_seconds: int):
    """A server that starts with a wrong clock waits for blocks that agree, even without a limit of their age."""
    async with shop(tmp_path, wall=NOW + ahead, expiry=NOW + PERIOD + 2 * HOUR, stale_seconds=stale_seconds) as server:
        await server.watcher.scan()

        assert await server.state() is State.OPEN
        assert server.kinds == [Kind.CLOCK]
        assert bool(server.context.chain_view.problem) == bool(stale_seconds)


async def test_fault_06_before_a_block_was_seen_nothing_is_due(tmp_path: Path):
    """While the node is away the server can't check the clock: a channel that seems due waits for the first block."""
    async with shop(tmp_path, wall=NOW + 4 * DAY, expiry=NOW + 5 * DAY) as server:
        server.chain.fail("tip", ChainFailed("no node"))
        await server.watcher.scan()
        assert await server.state() is State.OPEN
        server.chain.heal("tip")
        server.blocks.mine(NOW + 4 * DAY)
        await server.watcher.scan()
        assert await server.state() is State.CLOSED


@pytest.mark.parametrize("gap", [2 * HOUR, 3 * HOUR, 9 * HOUR, 60 * HOUR])
async def test_fault_06_a_gap_between_blocks_delays_nothing(tmp_path: Path, gap: int):
    """After any time without a block, a channel that is due by agreeing clocks is closed in the next scan."""
    async with shop(tmp_path, expiry=NOW + PERIOD + gap) as server:
        await server.watcher.scan()
        server.later(gap - 1)
        await server.watcher.scan()
        assert await server.state() is State.OPEN
        server.later(1)
        await server.watcher.scan()
        assert await server.state() is State.CLOSED
        assert Kind.CLOCK not in server.kinds


async def test_fault_06_the_node_may_be_away_when_a_channel_comes_due(tmp_path: Path):
    """A silent node is no reason to distrust the clock: the earlier agreement still counts."""
    async with shop(tmp_path, expiry=NOW + PERIOD + 9 * HOUR) as server:
        await server.watcher.scan()
        server.chain.fail("tip", ChainFailed("no node"))
        server.later(9 * HOUR)
        await server.watcher.scan()
        assert await server.state() is not State.OPEN
        assert server.kinds[:1] == [Kind.CHAIN]


async def test_fault_06_after_a_suspend_the_next_block_counts(tmp_path: Path):
    """The steady clock stood still: no channel is closed before the node's blocks agree, and then at once."""
    async with shop(tmp_path, expiry=NOW + PERIOD + 2 * HOUR) as server:
        await server.watcher.scan()
        server.later(10 * HOUR, steady=False)
        await server.watcher.scan()
        assert (await server.state(), server.kinds) == (State.OPEN, [Kind.CLOCK])
        server.blocks.mine(NOW + 10 * HOUR)
        await server.watcher.scan()
        assert (await server.state(), server.kinds) == (State.CLOSED, [])


async def test_fault_06_a_clock_that_was_behind_may_step_to_the_right_time(tmp_path: Path):
    """A step of hours towards the time of the blocks does not stop payments."""
    async with shop(tmp_path, wall=NOW - 30 * HOUR) as server:
        await server.watcher.scan()
        assert server.kinds == [Kind.CLOCK]
        assert not server.context.chain_view.problem
        server.clock.now = NOW
        await server.watcher.scan()
        assert server.kinds == []


async def test_fault_06_a_clock_that_creeps_ahead_is_found_too(tmp_path: Path):
    """Nine minutes per scan are less than a step, but their sum is a clock that no block agrees with."""
    async with shop(tmp_path, expiry=NOW + PERIOD + 3 * HOUR) as server:
        for _ in range(30):
            server.later(540, steady=False)
            await server.watcher.scan()
        assert await server.state() is State.OPEN
        assert server.kinds == [Kind.CLOCK]


async def test_fault_06_a_clock_that_is_behind_hides_no_old_tip(tmp_path: Path):
    """By such a clock no block is ever old; the steady clock measures the time without a block."""
    async with shop(tmp_path, wall=NOW - 30 * DAY) as server:
        await server.watcher.scan()
        assert not server.context.chain_view.problem
        server.later(STALE_SECONDS + 1)
        await server.watcher.scan()
        assert "the newest block is 180 minutes old" in server.context.chain_view.problem


async def test_fault_06_closed_channels_are_still_watched_under_a_wrong_clock(tmp_path: Path):
    """With a clock a year ahead at start, the server still checks old settlements for a reorg."""
    async with shop(tmp_path, wall=NOW + 365 * DAY, stale_seconds=0) as server:
        accepted(await server.registry.ask(server.payer.outpoint, Close(CloseReason.OPERATOR)))
        assert await server.state() is State.CLOSED
        server.blocks.forget()
        await server.watcher._chain.scan()
        await server.watcher._chain.endings.scan_ended()
        assert await server.blocks.spender(server.payer.outpoint) is not None


@looped("moment", [-(2**40), 0, NOW, 2**40, 2**70])
def test_any_time_can_be_shown(moment: int) -> None:
    """An alarm about an absurd clock time can be shown."""
    assert clock(UnixTime(moment))
