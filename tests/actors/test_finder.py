"""The operator's search for a client's channel, while payments continue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors import find_by_key as finder_module
from actors.find_by_key import Finder
from paychan.protocol.channel import Accepted, Channel, State
from paychan.protocol.errors import SearchTooLong
from tests.lib.world import DebugPayer, local


async def test_fault_71_a_search_is_one_walk_at_a_time(tmp_path: Path) -> None:
    """Twenty concurrent callers cause one search at a time, in small pages; a found channel is remembered."""
    async with local(tmp_path) as server:
        payers = [DebugPayer(number) for number in range(1, 6)]
        for payer in payers:
            assert isinstance(await server.opener.open(payer.request()), Accepted)
        store = _Counting(server.context.store)
        finder = Finder(store)  # type: ignore[arg-type]
        wanted = payers[3].key.public_key.format()

        found = await asyncio.gather(*(finder.find(wanted) for _ in range(20)))

        assert {channel.outpoint for channel in found if channel} == {payers[3].outpoint}
        assert store.most_at_once == 1
        assert store.scans == 1
        assert store.largest <= 200


async def test_fault_71_a_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that takes too long ends with an error that names the alternative."""
    monkeypatch.setattr(finder_module, "_MOST_SECONDS", -1.0)
    async with local(tmp_path) as server:
        assert isinstance(await server.opener.open(DebugPayer(1).request()), Accepted)
        with pytest.raises(SearchTooLong):
            await Finder(server.context.store).find(DebugPayer(2).key.public_key.format())


class _Counting:
    """A store that records how it is scanned."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.scans = self.largest = self.at_once = self.most_at_once = 0

    async def get(self, outpoint: Any) -> Channel | None:
        found: Channel | None = await self._store.get(outpoint)
        return found

    async def scan(self, state: State, **arguments: Any) -> Sequence[Channel]:
        self.scans += 1
        self.largest = max(self.largest, arguments["limit"])
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        found: Sequence[Channel] = await self._store.scan(state, **arguments)
        return found
