"""The operator restored a backup: what the server lost, the payer's next payment brings back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paychan.cli.payer.channel import app
from paychan.client import AsyncPayer, Channel, Payer
from tests.lib.restoring import back_up, lose_and_restore
from tests.lib.system import System

LOST_SAT = 10_000
"""Paid since the backup."""

both_versions = pytest.mark.parametrize("version", [1, 2])


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path / "system") as running:
        yield running


def opened(system: System, wallet: Path, version: int) -> Channel:
    channel = Payer(system.url, wallet=wallet, version=1 if version == 1 else 2).new_channel(hours=100)
    channel.fund_debug()
    channel.open()
    return channel


def received(system: System, channel: Channel) -> int:
    """Satoshi that the server has in its record of a channel."""
    return int(system.channel(channel.record.funding_outpoint)["value_received"])


@both_versions
@pytest.mark.parametrize("way", ["pay", "resume", "many", "status"])
def test_fault_11_the_first_payment_after_a_restore_brings_what_was_lost(
    system: System, tmp_path: Path, version: int, way: str
) -> None:
    """The server books a larger increment than was paid; that is a success, and the receipt names the difference."""
    channel = opened(system, tmp_path, version)
    backup = back_up(system)
    channel.pay(LOST_SAT)
    lose_and_restore(system, backup)
    assert received(system, channel) == channel.paid_sat - LOST_SAT
    if way == "status":
        assert not channel.status().unacknowledged
    else:
        paid = {"pay": lambda: channel.pay(1), "resume": channel.resume, "many": lambda: channel.pay_many(1, 200)}
        assert paid[way]().again_sat == LOST_SAT
    assert received(system, channel) == channel.paid_sat
    assert channel.pay(1).again_sat == 0


async def test_fault_11_the_same_on_an_event_loop(system: System, tmp_path: Path) -> None:
    """`AsyncChannel` accepts the larger increment as well, over a stream and by `PUT`."""
    async with AsyncPayer(system.url, wallet=tmp_path) as payer:
        channels = [await payer.new_channel(hours=100) for _ in range(2)]
        for channel in channels:
            await channel.fund_debug()
            await channel.open()
        backup = back_up(system)
        for channel in channels:
            await channel.pay(LOST_SAT)
        lose_and_restore(system, backup)
        assert (await channels[0].pay(1)).again_sat == LOST_SAT
        assert (await channels[1].pay_many(1, 200)).again_sat == LOST_SAT


def test_fault_11_the_command_names_what_was_booked_again(system: System, tmp_path: Path) -> None:
    """`paychan channel pay` says so to a person and to a program."""
    channels = [opened(system, tmp_path, 2) for _ in range(2)]
    backup = back_up(system)
    for channel in channels:
        channel.pay(LOST_SAT)
        channel.release()
    lose_and_restore(system, backup)
    say = ["pay", channels[0].name, "1", "--wallet", str(tmp_path)]
    said = CliRunner().invoke(app, say)
    assert "10,000 sat of earlier payments" in said.output
    told = CliRunner().invoke(app, ["pay", channels[1].name, "1", "--json", "--wallet", str(tmp_path)])
    assert json.loads(told.stdout)["again_sat"] == LOST_SAT
