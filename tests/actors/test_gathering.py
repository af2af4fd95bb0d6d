"""The node gets one request for unknown clients at a time, for any number of concurrent callers (faults 65, 67)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from paychan.chain.base import ChainFailed
from paychan.chain.bitcoind.shared_call import SharedCall
from paychan.chain.bitcoind.sought_scripts import MOST_SCRIPTS, SoughtScripts
from paychan.protocol.types import OutPoint


class Node:
    """Answers with the squares of even numbers, when the test allows it."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def ask(self, keys: Collection[int]) -> dict[int, int]:
        self.asked.append(list(keys))
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        return {key: key * key for key in keys if not key % 2}


async def test_fault_65_a_thousand_requests_become_two() -> None:
    """Calls during a request share the next request; each caller gets its own answer, requested after its call."""
    node = Node()
    gathering = SharedCall(node.ask)
    first = asyncio.create_task(gathering.answers([1, 2]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = [asyncio.create_task(gathering.answers([number])) for number in range(1000)]
    await asyncio.sleep(0)
    node.go.set()
    assert await first == {2: 4}
    assert await asyncio.gather(*others) == [{} if n % 2 else {n: n * n} for n in range(1000)]
    assert [len(keys) for keys in node.asked] == [2, 1000]
    assert await gathering.answers([]) == {}


async def test_fault_65_a_failure_reaches_only_its_callers() -> None:
    """Callers that were cancelled cause no error, and the next call starts a new request."""
    node = Node()
    node.go.set()
    node.failure = ChainFailed("away")
    gathering = SharedCall(node.ask)
    left = asyncio.create_task(gathering.answers([1]))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(ChainFailed, match="away"):
        await gathering.answers([2])
    node.failure = None
    assert await gathering.answers([2]) == {2: 4}


async def test_waiting_callers_are_answered_at_the_end() -> None:
    """Closing leaves no caller waiting."""
    gathering = SharedCall(Node().ask)
    waiting = [asyncio.create_task(gathering.answers([number])) for number in range(3)]
    await asyncio.sleep(0.01)
    waiting.append(asyncio.create_task(gathering.answers([9])))
    await asyncio.sleep(0)
    await gathering.close()
    endings = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(ending) for ending in endings} == {ChainFailed}


def test_fault_65_addresses_that_were_paid_stay_known_in_a_flood_of_others() -> None:
    """In a bounded table unfunded addresses are dropped for new ones; funded addresses are never dropped."""
    scripts = SoughtScripts()
    paid = "a914" + "11" * 20 + "87"
    scripts.entry(paid)
    scripts.note(paid, [OutPoint(bytes(32), 0)])
    for number in range(MOST_SCRIPTS + 1000):
        scripts.entry(f"a914{number:040x}87")
    assert len(scripts) == MOST_SCRIPTS
    assert list(scripts.entry(paid).outpoints) == [OutPoint(bytes(32), 0)]
    assert scripts.named_in("00a914" + paid + "00")
    assert not scripts.named_in("a914" + "22" * 20 + "87")
