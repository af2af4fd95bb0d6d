"""Ten thousand open channels in the real server: no more threads, and little more memory (threat 25)."""

from __future__ import annotations

import asyncio
import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from paychan.protocol.channel import Channel
from paychan.protocol.payment import encode_v1
from paychan.protocol.types import UnixTime
from paychan.store.base import Change
from paychan.store.leveldb.store import LevelDbStore
from tests.lib.system import System
from tests.lib.world import DebugPayer

CHANNELS = 10_000
MAX_GROWTH_BYTES = 100_000_000
WARM = 50
"""Channels woken first, so that buffers and caches reach their size before the measurement."""


async def fill(path: Path, channels: list[Channel]) -> None:
    """Store channels as if they had been opened before."""
    store = LevelDbStore.open(path, "debug")
    for begin in range(0, len(channels), 1_000):
        assert all(await store.commit([Change(None, channel) for channel in channels[begin : begin + 1_000]]))
    await store.close()


def pay(connection: http.client.HTTPConnection, payer: DebugPayer) -> None:
    """Pay one satoshi over a channel that received 10,000."""
    payment = encode_v1(payer.pays(10_001).payment)
    path = f"/v1/channels/{payer.outpoint.txid_hex}/{payer.outpoint.vout}?payment={payment}"
    connection.request("PUT", path, headers={"Content-Length": "0"})
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body


@pytest.mark.timeout(300)
def test_threat_25_ten_thousand_channels_cost_memory_and_no_threads(tmp_path: Path):
    """A payment on each of 10,000 channels wakes as many actors: no more threads, and less than 100 MB more memory."""
    system, expiry = System(tmp_path), UnixTime(int(time.time()) + 30 * 86_400)
    payers = [DebugPayer(f"one of many {n}", expiry) for n in range(CHANNELS)]
    asyncio.run(fill(system.state / "store", [payer.channel() for payer in payers]))
    with system:
        assert system.server is not None
        server = psutil.Process(system.server.process.pid)
        address = urlsplit(system.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port)
        for payer in payers[:WARM]:
            pay(connection, payer)
        threads, memory = server.num_threads(), server.memory_info().rss
        for payer in payers[WARM:]:
            pay(connection, payer)
        connection.close()
        growth = server.memory_info().rss - memory
        print(f"{growth / (CHANNELS - WARM):.0f} bytes of RSS per channel, {server.num_threads()} threads")

        assert system.manage("GET", "/health").json()["awake"] == CHANNELS
        assert server.num_threads() == threads
        assert growth < MAX_GROWTH_BYTES
