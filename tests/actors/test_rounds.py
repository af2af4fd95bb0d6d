"""Rounds over all open channels: no request waits for one, no channel costs memory, no unscanned channel is paid."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.exposure import Exposure
from actors.watching.expiry import Watcher
from paychan.chain.base import ChainFailed, Funding, Tip
from paychan.chain.debug import DebugChain
from paychan.protocol.channel import Close, CloseReason, State
from paychan.protocol.errors import ChainUnavailable
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.supervisor import Supervisor
from tests.lib.channels import NOW, RULES, many
from tests.lib.world import Clock, DebugPayer, Local, accepted, local, refused, until

PAGE = 10
SOON = NOW + RULES.settlement_period_seconds + RULES.min_duration_seconds
EARLY, LATE = (DebugPayer(name, UnixTime(NOW + days * 86_400)) for name, days in (("early", 5), ("late", 300)))


class Blocks(DebugChain):
    """A chain whose tip the test sets, and on which outputs may be missing or unconfirmed."""

    def __init__(self) -> None:
        super().__init__(lambda: NOW)
        self.tip_hash, self.median_time = "01" * 32, NOW
        self.gone: set[OutPoint] = set()
        self.unconfirmed: set[OutPoint] = set()
        self.asked: list[OutPoint] = []
        self.after_page: Callable[[], None] = lambda: None

    async def tip(self) -> Tip:
        return Tip(1, self.tip_hash, NOW, self.median_time)

    async def unspent(self, outpoints: Any) -> dict[OutPoint, Funding]:
        self.asked += outpoints
        found = {
            outpoint: self.seen(funding)
            for outpoint, funding in (await super().unspent(outpoints)).items()
            if outpoint not in self.gone
        }
        self.after_page()
        return found

    def seen(self, funding: Funding) -> Funding:
        return Funding(funding.outpoint, funding.value_sat, 0) if funding.outpoint in self.unconfirmed else funding

    async def funding(self, payee: Any, at: OutPoint | None = None) -> tuple[Funding, ...]:
        return tuple(map(self.seen, await super().funding(payee, at)))


@asynccontextmanager
async def crowded(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int = 35, **rules: Any
) -> AsyncIterator[tuple[Local, Blocks]]:
    """Start a server with many open channels between an early one and a late one; pages are small."""
    monkeypatch.setattr("actors.watching.funding._PAGE", PAGE)
    chain = Blocks()
    async with local(directory, Clock(), chain=chain, **rules) as server:
        await server.fill([EARLY.channel(), *many(number), LATE.channel()])
        yield server, chain


async def rounds(watcher: Watcher, number: int) -> None:
    """Scan `number` times, as the watcher does during a round."""
    for _ in range(number):
        await watcher._chain.scan()


async def test_the_first_scan_takes_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With any number of open channels the scan before the port opens covers one page; later scans end the round."""
    async with crowded(tmp_path, monkeypatch) as (server, chain):
        await server.watcher.scan()
        assert len(chain.asked) == PAGE
        assert not server.context.chain_view.is_whole
        await rounds(server.watcher, 3)
        assert server.context.chain_view.is_whole
        assert len(chain.asked) == len(set(chain.asked)) == 37


async def test_the_watcher_goes_through_a_round_without_waiting_for_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A running watcher reaches the end of the round without further events."""
    async with crowded(tmp_path, monkeypatch) as (server, chain):
        server.watcher._interval_seconds = 60
        watching = Supervisor().run("watcher", server.watcher.run)
        await until(lambda: server.context.chain_view.is_whole)
        await watching.stop()
        assert len(set(chain.asked)) == 37


async def test_a_due_channel_is_settled_without_news_of_its_funding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Due channels come from the index, not from the round, so they are settled while the chain gives no answer."""
    async with crowded(tmp_path, monkeypatch) as (server, _):
        due = [DebugPayer(f"due {n}", UnixTime(SOON + 1 + n)) for n in range(3 * PAGE)]
        await server.fill([payer.channel() for payer in due])
        server.chain.fail("unspent", ChainFailed("busy"))
        server.clock.now = SOON + 3 * PAGE - RULES.settlement_period_seconds
        await server.watcher.scan()
        assert {(await server.stored(payer)).state for payer in due} == {State.CLOSED}
        assert (await server.stored(LATE)).state is State.OPEN


@pytest.mark.parametrize("jump", [-700 * 86_400, 0, 700 * 86_400])
async def test_no_jump_of_the_clock_hides_a_due_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int):
    """A clock that is years behind or years ahead of the chain's time is not believed."""
    async with crowded(tmp_path, monkeypatch) as (server, chain):
        due = DebugPayer("due", UnixTime(SOON + 1))
        await server.fill([due.channel()])
        chain.median_time = UnixTime(due.expiry - RULES.settlement_period_seconds)
        server.clock.now = chain.median_time + jump
        await server.watcher.scan()
        assert (await server.stored(due)).state is State.CLOSED
        assert (await server.stored(LATE)).state is State.OPEN


async def test_a_server_that_was_killed_in_a_round_starts_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The scans before the kill do not count after it, and channels that came due meanwhile are settled at once."""
    due = DebugPayer("due", UnixTime(SOON + 1))
    async with crowded(tmp_path, monkeypatch) as (server, _):
        await server.fill([due.channel()])
        await rounds(server.watcher, 2)
    chain, clock = Blocks(), Clock(due.expiry - RULES.settlement_period_seconds)
    chain.gone.add(EARLY.outpoint)
    async with local(tmp_path, clock, chain=chain) as server:
        await server.watcher.scan()
        assert (await server.stored(due)).state is State.CLOSED
        pay = EARLY.pays(10_001)
        assert isinstance(refused(await server.registry.ask(EARLY.outpoint, pay)), ChainUnavailable)


async def test_a_channel_is_scanned_before_its_first_payment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A channel whose funding vanished while the server was down accepts no payment, even early in the round."""
    async with crowded(tmp_path, monkeypatch) as (server, chain):
        chain.gone.add(LATE.outpoint)
        await server.watcher.scan()
        pay = LATE.pays(10_001)
        assert isinstance(refused(await server.registry.ask(LATE.outpoint, pay)), ChainUnavailable)
        await rounds(server.watcher, 3)
        assert isinstance(refused(await server.registry.ask(LATE.outpoint, pay)), ChainUnavailable)
        chain.gone.clear()
        await rounds(server.watcher, 1)
        assert accepted(await server.registry.ask(LATE.outpoint, pay)).value_sat == 1


async def test_payments_before_the_turn_ask_the_chain_once_and_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sixteen payments for a sleeping channel: one scan of its output, then all are accepted in order."""
    async with crowded(tmp_path, monkeypatch) as (server, chain):
        await server.watcher.scan()
        payments = [server.registry.ask(LATE.outpoint, LATE.pays(10_000 + n)) for n in range(1, 17)]
        outcomes = await asyncio.gather(*payments)
        assert [accepted(outcome).value_sat for outcome in outcomes] == [1] * 16
        assert chain.asked.count(LATE.outpoint) == 1


async def test_a_chain_that_is_silent_when_a_channel_wakes_freezes_that_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It accepts no payment until the chain has answered, can close meanwhile, and thaws by itself."""
    async with crowded(tmp_path, monkeypatch) as (server, _):
        await server.watcher.scan()
        server.chain.fail("unspent", ChainFailed("busy"), times=1)
        pay = LATE.pays(10_001)
        assert "since the start" in str(refused(await server.registry.ask(LATE.outpoint, pay)))
        server.watcher._chain._unverified_scanned_at = 0.0
        await rounds(server.watcher, 1)
        assert accepted(await server.registry.ask(LATE.outpoint, pay)).value_sat == 1

        server.registry.passivate(0)
        server.chain.fail("unspent", OSError("a bug"), times=1)
        accepted(await server.registry.ask(LATE.outpoint, Close(CloseReason.OPERATOR)))
        assert (await server.stored(LATE)).state is State.CLOSED


async def test_after_the_first_round_waking_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A payment that wakes a channel costs no request to the chain, also during a later round."""
    async with crowded(tmp_path, monkeypatch) as (server, chain):
        await rounds(server.watcher, 4)
        chain.tip_hash = "02" * 32
        await rounds(server.watcher, 1)
        before = len(chain.asked)
        accepted(await server.registry.ask(LATE.outpoint, LATE.pays(10_001)))
        assert len(chain.asked) == before


async def test_blocks_that_come_quickly_let_a_round_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a new block after every page each channel is still scanned, and then a new round begins."""
    async with crowded(tmp_path, monkeypatch) as (server, chain):

        def mine() -> None:
            chain.tip_hash = f"{len(chain.asked):064x}"

        chain.after_page = mine
        await rounds(server.watcher, 4)
        assert LATE.outpoint in chain.asked
        await rounds(server.watcher, 4)
        assert chain.asked.count(LATE.outpoint) == 2


async def test_unconfirmed_funding_waits_until_all_open_channels_are_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The limit of unconfirmed funding counts all channels, so it is not used before all were scanned."""
    new = DebugPayer("new")
    async with crowded(tmp_path, monkeypatch, settings={"exposure": Exposure(Sat(10**15))}, min_confirmations=0) as (
        server,
        chain,
    ):
        chain.unconfirmed |= {new.outpoint, LATE.outpoint}
        await server.watcher.scan()
        assert isinstance(refused(await server.opener.open(new.request())), ChainUnavailable)
        await rounds(server.watcher, 3)
        assert set(server.context.exposure.open) == {LATE.outpoint}
        accepted(await server.opener.open(new.request()))
        assert set(server.context.exposure.open) == {LATE.outpoint, new.outpoint}


async def test_nothing_is_kept_for_an_idle_channel(tmp_path: Path):
    """After rounds over 3,000 sleeping channels, less than a byte per channel is left in memory."""
    chain = Blocks()
    async with local(tmp_path, Clock(), chain=chain) as server:
        await server.fill(many(3_000))
        await rounds(server.watcher, 4)
        chain.asked.clear()
        chain.tip_hash = "02" * 32
        gc.collect()
        tracemalloc.start()
        try:
            await rounds(server.watcher, 4)
            chain.asked.clear()
            gc.collect()
            kept = sum(
                each.size for each in tracemalloc.take_snapshot().statistics("filename") if "actors" in str(each)
            )
        finally:
            tracemalloc.stop()
        assert server.context.chain_view.is_whole
        assert server.registry.awake == 0
        assert kept < 3_000
