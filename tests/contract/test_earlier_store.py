"""A store and a backup of an earlier release: every channel is read, and is written back in the version of today."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import plyvel
import pytest
from msgspec.structs import replace

from paychan.protocol.channel import Channel, Confirmed, State
from paychan.protocol.record import VERSION
from paychan.protocol.state_machine import apply
from paychan.store.backup import create as backup
from paychan.store.base import Change
from paychan.store.leveldb.store import LevelDbStore
from tests.contract.backends import NETWORK
from tests.contract.backups import one_of_each_state, stored
from tests.lib.channels import VIEW, accepted
from tests.lib.vectors import DIRECTORY

FROZEN = json.loads((DIRECTORY / "store" / "v2.json").read_text())
"""Store and backup of `one_of_each_state`, written by the release before records named a channel kind."""

EXPECTED = {channel.state: [channel] for channel in one_of_each_state()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The store's directory, with the entries of the earlier release."""
    path = tmp_path / "store"
    asyncio.run(LevelDbStore.open(path, NETWORK).close())
    database = plyvel.DB(str(path))
    for key, value in FROZEN["entries"].items():
        database.put(bytes.fromhex(key), bytes.fromhex(value))
    database.close()
    return path


def versions(path: Path) -> list[int]:
    """Versions of all records, in the order of their keys."""
    database = plyvel.DB(str(path))
    try:
        return [value[0] for key, value in database if len(key) == 37 and key[:1] == b"c"]
    finally:
        database.close()


def test_every_channel_is_read(store: Path) -> None:
    """The index and the records of the earlier release give the same channels, one in each state."""
    assert stored(store) == EXPECTED


def test_a_channel_that_changes_is_written_in_the_new_version(store: Path) -> None:
    """The next change migrates a record; the others stay as they are."""
    before = EXPECTED[State.PUBLISHED][0]
    assert before.closing is not None
    assert before.closing.settlement is not None
    after = accepted(apply(before, Confirmed(before.closing.settlement.txid), VIEW))

    asyncio.run(_commit(store, before, after))

    assert sorted(versions(store)) == [2] * (len(State) - 1) + [VERSION]
    assert stored(store)[State.CLOSED] == sorted(
        [*EXPECTED[State.CLOSED], after], key=lambda channel: channel.outpoint.serialize()
    )


async def _commit(path: Path, before: Channel, after: Channel) -> None:
    store = LevelDbStore.open(path, NETWORK, create=False)
    try:
        assert await store.commit([Change(before, after)]) == [True]
    finally:
        await store.close()


def test_an_earlier_backup_is_restored(tmp_path: Path) -> None:
    """A backup of the earlier release is verified and restored; its channels are marked as restored."""
    path = tmp_path / "paychan-test-20231114T221320Z.backup"
    path.write_bytes(bytes.fromhex(FROZEN["backup"]))
    path.chmod(0o600)

    backup.restore(path, tmp_path / "store", NETWORK)

    assert stored(tmp_path / "store") == {
        state: [replace(channel, restored=True) for channel in channels] for state, channels in EXPECTED.items()
    }
    assert versions(tmp_path / "store") == [VERSION] * len(State)
