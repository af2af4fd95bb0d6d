"""The server's work between its start and its first answer (threat 34)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from paychan.protocol.channel import Channel, State
from paychan.protocol.types import UnixTime
from paychan.store.base import Change
from paychan.store.leveldb.store import LevelDbStore
from tests.lib.system import System
from tests.lib.world import DebugPayer

HOUR = 3_600


def payer(name: str, hours: int) -> DebugPayer:
    """Return the client of a channel that expires in some hours; the settlement period is 6 hours by default."""
    return DebugPayer(name, UnixTime(int(time.time()) + hours * HOUR))


async def fill(path: Path, *histories: list[Channel]) -> None:
    store = LevelDbStore.open(path, "debug")
    for versions in histories:
        for previous, channel in zip([None, *versions], versions, strict=False):
            assert await store.commit([Change(previous, channel)]) == [True]
    await store.close()


def test_threat_34_overdue_channels_are_settled_before_the_server_listens(tmp_path: Path):
    """Before the first client is served, channels that became due during the downtime are settled; the others are open."""
    system = System(tmp_path)
    due, begun, fresh = payer("due", 5), payer("begun", 24), payer("fresh", 7)
    closing = begun.history(State.CLOSING)[:2]
    asyncio.run(fill(system.state / "store", [due.channel()], closing, [fresh.channel()]))
    with system:
        states = [system.channel(each.outpoint)["status"] for each in (due, begun, fresh)]

    assert states == ["closed", "closed", "open"]


def test_an_uneconomical_overdue_channel_does_not_delay_the_start(tmp_path: Path):
    """A channel that is not worth its settlement raises no alarm, and does not delay the start."""
    system = System(tmp_path)
    poor = payer("poor", 1)
    asyncio.run(fill(system.state / "store", [poor.channel(paid_sat=100)]))
    with system:
        health = system.manage("GET", "/health")

        assert health.status_code == 200
        assert health.json()["alarms"] == []
        assert health.json()["all_channels_seen"] is True
        assert system.channel(poor.outpoint)["status"] == "open"


@pytest.mark.parametrize(("place", "mode"), [("state", 0o777), ("store", 0o777), ("store", 0o770), ("above", 0o777)])
def test_fault_80_no_start_where_another_user_can_replace_the_store(tmp_path: Path, place: str, mode: int) -> None:
    """The server refuses a directory that others can write, as the signer does; with the mode mended it starts."""
    (tmp_path / "above").mkdir(mode=0o700)
    system = System(tmp_path / "above" / "system")
    with system:
        pass
    directory = {"state": system.state, "store": system.state / "store", "above": tmp_path / "above"}[place]
    before = directory.stat().st_mode & 0o777
    directory.chmod(mode)
    with pytest.raises(
        AssertionError, match=rf"(others can write to it|can be written by all users).*`chmod g?o-w {directory}`"
    ):
        system.start_server()
    assert system.server is not None
    assert system.server.process.wait(30) == 2
    directory.chmod(before)
    with system:
        assert system.manage("GET", "/health").status_code == 200
