"""`channel_for` on a real node: coins are asked for once, and a channel that waits for them is gone on with."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from paychan.client import Channel, FundingMissing, Network, Payer, State
from tests.lib.customer import market
from tests.lib.node import Node


def test_fault_51_a_channel_is_funded_once_and_gone_on_with(tmp_path: Path) -> None:
    """Without coins the error names address and amount; a wallet that is called once pays the least that suffices."""
    asked: list[str] = []
    with market(tmp_path) as (system, node), Payer(system.url, wallet=tmp_path / "w", network=Network.REGTEST) as payer:

        def fail(channel: Channel) -> None:
            asked.append(channel.address)
            msg = "the wallet is away"
            raise OSError(msg)

        with pytest.raises(OSError, match="away"):
            payer.channel_for(room_sat=5000, fund=fail)
        for fund in (None, fail):
            with pytest.raises(FundingMissing, match=asked[0]):
                payer.channel_for(room_sat=5000, fund=fund, wait_seconds=0)
        (record,) = payer.records()
        assert asked == [record.funding_address]
        assert record.amount_sat == record.open_price_sat + record.dust_sat + 5000

        node.fund(record.funding_address, record.amount_sat)
        node.mine()
        channel = payer.channel_for(room_sat=5000, wait_seconds=30)
        assert channel.name == record.name
        channel.pay(5000)

        def pay_by_node(channel: Channel) -> None:
            node.fund(channel.address, channel.amount_sat)
            node.mine()

        other = payer.channel_for(room_sat=1, amount_sat=300_000, fund=pay_by_node)
        assert (other.record.state, other.record.funding_sat) == (State.OPEN, 300_000)
        assert len(payer.records()) == 2


def made_once_the_server_saw_the_block(payer: Payer, node: Node) -> Channel:
    """Ask until the server knows the newest block."""
    while True:
        channel = payer.new_channel(hours=100)
        if channel.record.expiry > node.median_time:
            return channel
        time.sleep(0.1)


def test_fault_53_a_channel_can_be_made_on_a_chain_whose_clock_is_ahead(tmp_path: Path) -> None:
    """After `paychan node pass` the hours of a new channel count from the chain's time, on regtest alone."""
    with market(tmp_path) as (system, node), Payer(system.url, wallet=tmp_path / "w", network=Network.REGTEST) as payer:
        node.pass_median_time(int(time.time()) + 180 * 3600)
        channel = made_once_the_server_saw_the_block(payer, node)

        assert channel.record.expiry > node.median_time + 100 * 3600
        node.fund(channel.address, channel.amount_sat)
        node.mine()
        channel.wait_funded(30)
        channel.open()
        assert channel.record.state is State.OPEN
