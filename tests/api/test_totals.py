"""`GET /totals`: unsettled value, the cost of settling it, channels not worth settling, and `paychan status`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from actors.totals import LatestTotals, ReserveInfo, Totals, totals
from paychan.chain.base import ChainFailed, Funding
from paychan.chain.debug import DebugChain
from paychan.protocol.channel import Channel, Close, CloseReason, Rejected, State
from paychan.protocol.fees import ChainFees
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.settlement import settlement_size
from paychan.protocol.state_machine import apply
from paychan.protocol.types import OutPoint, Sat
from paychan.signer_client.base import SignerAbsent
from tests.lib.channels import RULES, VIEW, Payer, many
from tests.lib.system import System
from tests.lib.world import Local, local

LARGEST = bytes(34)


def size(channel: Channel) -> int:
    return settlement_size([channel.claim], LARGEST)


async def counted(server: Local) -> Totals:
    return await totals(server.context, 0)


async def test_unsettled_value_is_shown_with_the_cost_of_settling(tmp_path: Path) -> None:
    """The cost counts open channels at the present rate, signed settlements at their fee, closed channels at 0."""
    async with local(tmp_path) as server:
        records = [Payer(state.value).history(state)[-1] for state in State]
        await server.fill(records)
        server.context.chain_view.fees = ChainFees(30, 2)
        found = await counted(server)
        open_one, closing, published = records[:3]
        signed = [each.closing.settlement.fee_sat for each in (closing, published) if each.closing]
        assert found.channels == dict.fromkeys((state.value for state in State), 1)
        assert found.unsettled_sat == sum(each.received_sat for each in records[:3])
        assert found.settling_sat == 30 * size(open_one) + sum(signed)
        assert (found.fee_estimate_sat_per_vb, found.fee_floor_sat_per_vb) == (30, 2)
        assert found.next_expiry == open_one.terms.expiry.lock_time


async def test_a_settlement_of_several_channels_costs_once(tmp_path: Path) -> None:
    """The fee of a settlement of several channels counts once."""
    async with local(tmp_path) as server:
        closing = Payer("together").history(State.CLOSING)[-1]
        await server.fill(many(3, closing))
        assert closing.closing is not None
        assert closing.closing.settlement is not None
        assert (await counted(server)).settling_sat == closing.closing.settlement.fee_sat


@pytest.mark.parametrize("movable", [False, True])
async def test_a_channel_too_small_to_close_is_not_worth_settling(tmp_path: Path, movable: bool) -> None:
    """The limit is that of the state machine, to the satoshi, for every kind of change address."""
    limit = size(Payer("small").channel()) + RULES.dust_sat
    channels = [Payer(f"small {more}", movable=movable).channel(limit + more) for more in range(-5, 5)]
    outcomes = [apply(channel, Close(CloseReason.OPERATOR), VIEW) for channel in channels]
    refused = [each for each, outcome in zip(channels, outcomes, strict=True) if isinstance(outcome, Rejected)]
    assert 0 < len(refused) < len(channels)
    async with local(tmp_path) as server:
        await server.fill(channels)
        found = await counted(server)
        assert found.too_small_channels == len(refused)
        assert found.too_small_sat == sum(each.received_sat for each in refused)
        assert found.settling_sat == sum(10 * size(each) for each in channels if each not in refused)


class Saving(DebugChain):
    """A chain with two coins of the reserve, one of them confirmed."""

    async def funding(self, payee):
        if isinstance(payee, ChannelTerms):
            return await super().funding(payee)
        return tuple(Funding(OutPoint(bytes(32), index), Sat(10_000 + index), index) for index in range(2))


async def test_the_reserve_is_shown_with_its_address(tmp_path: Path) -> None:
    """The reserve has address, value and number of usable coins, or the problem; the other totals are shown anyway."""
    async with local(tmp_path, chain=Saving()) as server:
        await server.fill([Payer("one").channel()])
        address = (await counted(server)).reserve.address
        assert (await counted(server)).reserve == ReserveInfo(address, Sat(20_001), 1)
        server.chain.fail("funding", ChainFailed("no connection"))
        assert (await counted(server)).reserve == ReserveInfo(address, problem="no connection")
        server.signer.fail("reserve_key", SignerAbsent("stopped"))
        assert (await counted(server)).reserve == ReserveInfo(problem="stopped")
        assert (await counted(server)).channels["open"] == 1


async def test_a_silent_chain_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a timeout the totals are shown without the reserve."""
    monkeypatch.setattr("actors.totals._RESERVE_SECONDS", 0.01)
    async with local(tmp_path) as server:
        server.chain.hold("funding")
        found = await counted(server)
        assert found.reserve.address
        assert found.reserve.problem == "no answer of the chain within 0 s"


async def test_many_channels_are_counted_in_one_pass(tmp_path: Path) -> None:
    """Each channel is read once, and a settlement is built once for all channels of the same lengths."""
    async with local(tmp_path) as server:
        await server.fill(many(5_000))
        server.store.calls.clear()
        found = await counted(server)
        assert found.settling_sat == 5_000 * 10 * size(Payer("many").channel())
        pages, one_empty_for_each_state = 5, len(State)
        assert server.store.calls["scan"] == pages + one_empty_for_each_state


async def test_requests_at_the_same_time_share_a_count(tmp_path: Path) -> None:
    """Five requests at once cause one pass; a later request causes another."""
    async with local(tmp_path) as server:
        await server.fill(many(10))
        latest = LatestTotals(server.context, lambda: 0)
        server.store.calls.clear()
        found = await asyncio.gather(*(latest.get() for _ in range(5)))
        assert {each.channels["open"] for each in found} == {10}
        passes = server.store.calls["scan"]
        await server.fill(many(11)[10:])
        assert (await latest.get()).channels["open"] == 11
        assert server.store.calls["scan"] == 2 * passes


async def test_many_channels_are_counted_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a number of channels the last count is shown for some time, and while the next count takes long."""
    monkeypatch.setattr("actors.totals._MANY_CHANNELS", 9)
    monkeypatch.setattr("actors.totals._REST", 1_000_000)
    monkeypatch.setattr("actors.totals._PATIENCE_SECONDS", 0.01)
    async with local(tmp_path) as server:
        await server.fill(many(10))
        latest = LatestTotals(server.context, lambda: 0)
        first = await latest.get()
        await server.fill(many(11)[10:])
        server.clock.now += 60
        assert await latest.get() is first
        latest._again_at = 0.0
        server.store.hold("scan")
        assert await latest.get() is first
        server.store.release("scan")
        monkeypatch.setattr("actors.totals._PATIENCE_SECONDS", 60)
        second = await latest.get()
        assert (second.channels["open"], second.counted_at) == (11, server.clock.now)


@pytest.mark.usefixtures("open_v1")
def test_status_shows_the_economy(system: System) -> None:
    """Status shows unsettled value, cost and rates, and a warning not to pay to the debug key."""
    program = Path(sys.executable).with_name("paychan")
    command = [program, "status", system.server_file]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}).stdout
    answer = system.manage("GET", "/totals").json()
    unsettled = f"{answer['unsettled_sat']:,} sat; settling all of it now costs {answer['settling_sat']:,} sat"
    assert unsettled in said
    assert "no estimate, nothing is relayed below 1 sat/vB" in said
    assert "0 sat, confirmed coins: 0" in said
    assert "send no coins there, the debug key is public" in said
    assert answer["reserve"]["address"] not in said
    assert ("too small" in said) == bool(answer["too_small_channels"])  # other tests leave channels
