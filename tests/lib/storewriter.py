"""A process that commits without end, for tests that kill it: `python -m tests.lib.storewriter DIRECTORY`.

Channels are in groups; each commit changes all channels of a group, and moves each in the index. For each acknowledged
commit the process writes a line `<group> <seq>` to standard output, after `commit` has returned. The first line,
written before any change, is `process <id>`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from itertools import cycle
from pathlib import Path

import msgspec

from paychan.protocol.channel import Channel, State
from paychan.store.base import Change, Store, StoreFailed, walk
from paychan.store.leveldb.store import LevelDbStore
from tests.lib.channels import many

NETWORK = "test"
GROUP_SIZES = (1, 3, 8, 64)


def groups() -> list[list[Channel]]:
    """Return the initial channels, by group."""
    channels = iter(many(sum(GROUP_SIZES)))
    return [[next(channels) for _ in range(size)] for size in GROUP_SIZES]


def version(channel: Channel, seq: int) -> Channel:
    """Return a channel at a version: alternately open and closing."""
    return msgspec.structs.replace(channel, seq=seq, state=(State.CLOSING, State.OPEN)[seq % 2])


async def found_seqs(store: Store) -> list[int]:
    """Return the sequence number of each group in the store (0: not stored).

    Raises:
        AssertionError: a commit is stored in part, or the index does not list each channel once, with its state.
    """
    seqs = []
    for group in groups():
        stored = [await store.get(channel.outpoint) for channel in group]
        found = {channel.seq if channel else 0 for channel in stored}
        assert len(found) == 1, f"a commit is stored in part: versions {found}"
        seqs.append(found.pop())
        assert stored == [version(channel, seqs[-1]) if seqs[-1] else None for channel in group]
    listed: list[Channel] = []
    for state in State:
        found_in_state = [channel async for channel in walk(store, state)]
        assert all(channel.state is state for channel in found_in_state)
        listed += found_in_state
    want = [version(channel, seq) for group, seq in zip(groups(), seqs, strict=True) if seq for channel in group]
    assert sorted(listed, key=_by_outpoint) == sorted(want, key=_by_outpoint)
    return seqs


def _by_outpoint(channel: Channel) -> bytes:
    return channel.outpoint.serialize()


async def _write(directory: Path) -> None:
    store = LevelDbStore.open(directory, NETWORK)
    seqs = await found_seqs(store)
    for number, group in cycle(enumerate(groups())):
        seq = seqs[number]
        try:
            changes = [Change(version(channel, seq) if seq else None, version(channel, seq + 1)) for channel in group]
            assert all(await store.commit(changes))
        except StoreFailed as error:
            _tell(f"failed: {error}")
            continue
        seqs[number] += 1
        _tell(f"{number} {seqs[number]}")


def _tell(line: str) -> None:
    os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    _tell(f"process {os.getpid()}")
    asyncio.run(_write(Path(sys.argv[1])))
